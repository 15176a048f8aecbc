"""A code that places workers, and reads their answers, in the space of the inputs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._arrays import as_arrays, as_float, concatenate_rows
from .._float64 import in_float64
from .._pytree import pytree
from .._side_input import SideInput, is_side_input, without_marks
from ..checks import batch_size, check_count, check_mask, check_scalar, is_real, static_value
from ..interpolants.kernel import Process, Sites, fit_process, posterior, spread_of
from ..linops import AbstractLinop, Dense, Gather, split
from ..linops.dense import matmul
from .abstract import AbstractCode, adapt_group, decode_as_planned
from .kernel_placement import compiled_placement
from .plan import Plan, Prior

# The length by which workers are placed and with which answers are decoded that have not been fitted, in units of the
# largest distance between inputs of the group.
_DEFAULT_LENGTH = 0.3
# How many answers the errors count for that a prior expects.
_PRIOR_COUNT = 20.0
# Sites in a set, sets of them, and groups that they are drawn from, that a process is fitted to where a batch has more.
# Fitting takes most of the time of decoding, in proportion to the sets and to the cube of their sites.
_FITTED_SITES, _FITTED_SETS, _FITTED_GROUPS = 128, 2, 64


class KernelContext(NamedTuple):
    """Holds what a kernel code's encoder and decoder read of a group.

    Attributes:
        pairs: Worker n computes a point between the inputs pairs[n], int32 (N, 2); an input itself where both are one.
        shares: How far from the first to the second, from 0 to 1/2, (N,).
        workers: Features of the coded inputs, (N, features); None where these are the inputs'.
        data: Features of the inputs, (K, features).
        process: The process by which answers are decoded; fitted to them by `adapt`.
        variances: Of all numbers of an answer, (numbers,), in the unit of the process; None before `adapt`.
    """

    pairs: Int[Array, "workers 2"]
    shares: Float[Array, "workers"]
    workers: Float[Array, "workers features"] | None
    data: Float[Array, "data features"]
    process: Process
    variances: Float[Array, "numbers"] | None = None


@final
@pytree("num_data", "num_workers", "mixes", "features", eq=False)
class KernelCode(AbstractCode):
    r"""Has workers compute inputs, copies and points between, and decodes by a Gaussian process over the inputs.

    Worker k < K computes input k. The others compute whatever lowers the expected variance of the results most, one
    after the other: copies of inputs, or points :math:`(1 - s) x_i + s x_j` between neighbours, s = 1/4 or 1/2,

    .. math:: \min_c \sum_k w_k \, [(1 - p) \, v_k(c) + p \, v_k]

    with :math:`v_k` the variance of input k given the answers of all workers but its own, :math:`v_k(c)` the same after
    candidate c, p the share of workers that are late, and weights w, the prior's risks if there is one. A worker placed
    before, which may be late, counts as an answer with noise of p / (1 - p) times its largest variance given the
    answers to all inputs but one. Where a model is smooth on the scale of the group, a point between inputs tells about
    several of them; where it is not, it tells nothing and copies are chosen.

    The process is fitted to the answers that came, by maximum likelihood: whether it is smooth, its length, and the
    share that other inputs tell nothing about. From a handful of answers little can be fitted: a process and a mean
    that are known beforehand, as `jaxcode.tune` fits them to a sample, make better results. Two answers are enough to
    decode every input.

    Attributes:
        num_data: K >= 2.
        num_workers: N >= K.
        length: The length by which workers are placed, in units of the largest distance between inputs of a group; None
            to place them by `process`, which must be given then.
        late: p, the share of workers that are late, such as S / N.
        mixes: Whether workers may compute points between inputs; if not, worker n computes input n mod K, or what a
            plan assigns to it.
        features: Maps a batch, leaves (B, ...), to the features whose distances count, (B, features), traced and
            hashable, such as `jaxcode.ordering.sensitivity(f, x)`. If None, the inputs themselves.
        metric: What features are multiplied by before distances are measured: a number for each, (features,), or a
            matrix (features, any number). If None, they stay as they are. `jaxcode.training.refine` learns it.
        process: The `jaxcode.interpolants.kernel.Process` by which answers are decoded, its length in the unit of the
            features; then none is fitted, which takes most of the time of decoding. If None, one is fitted to the
            answers of each batch.
        mean: Mean of the answers, leaves (...), which is the prior mean where a plan has no other; if None, it is
            estimated from the answers.

    Raises:
        ValueError: If numbers are not whole or too small, or length is not above zero, or late not from 0 to 1, or
            metric is neither a vector nor a matrix of finite numbers, or process is not one.

    References:
        Sacks, Welch, Mitchell and Wynn, Design and analysis of computer experiments, Statistical Science 4 (1989).

    >>> code = KernelCode(num_data=4, num_workers=6)
    >>> x = jnp.linspace(0.0, 1.0, 4)[:, None]
    >>> plan = code.plan(x)
    >>> results = code.decode(jnp.exp(code.encode(x, plan)), jnp.arange(6) != 1, plan)
    >>> bool(jnp.max(jnp.abs(results - jnp.exp(x))) < 0.01)
    True
    """

    num_data: int
    num_workers: int
    length: ArrayLike | None = _DEFAULT_LENGTH
    late: ArrayLike = 0.1
    mixes: bool = True
    features: Callable[[PyTree[Array]], Array] | None = None
    metric: ArrayLike | None = None
    process: Process | None = None
    mean: PyTree[ArrayLike] | None = None
    nodes = None
    predicts_error = True
    inputs_first = True
    needs_plan = True
    adapts = True

    def __post_init__(self):
        num_data = check_count("num_data", self.num_data, least=2)
        if check_count("num_workers", self.num_workers) < num_data:
            raise ValueError(f"num_workers is {self.num_workers}; expected at least num_data, {num_data}")
        if self.length is not None or self.process is None:
            check_scalar(
                "length", self.length, lambda length: length > 0, "a number above 0, in units of a group's extent"
            )
        check_scalar("late", self.late, lambda late: 0 <= late <= 1, "a share from 0 to 1, such as S / N")
        for name in ("length", "late"):
            static = static_value(getattr(self, name))
            if static is not None:
                object.__setattr__(self, name, float(static))
        if self.features is not None and not callable(self.features):
            raise ValueError(f"features is {self.features!r}; expected a function of a batch, or None")
        if self.process is not None and not isinstance(self.process, Process):
            raise ValueError(f"process is {self.process!r}; expected a Process of jaxcode.interpolants.kernel, or None")
        metric = None if self.metric is None else static_value(self.metric)
        if metric is not None:
            if metric.ndim not in (1, 2) or not (is_real(metric.dtype) and np.isfinite(metric).all()):
                raise ValueError(f"metric is {metric}; expected finite numbers, a vector (features,) or a matrix")
            object.__setattr__(self, "metric", np.float64(metric))

    @property
    def assigns(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a plan may assign inputs to workers."""
        return not self.mixes

    def plan(
        self,
        x: PyTree[ArrayLike],
        risk: Float[ArrayLike, "data"] | None = None,
        assignment: Int[ArrayLike, "workers"] | None = None,
    ) -> Plan:
        """Plans a group: what each worker computes.

        Args:
            x: The group, leaves (K, ...) of real numbers.
            risk: What a wrong result of each input costs, (K,), not negative; all alike if None.
            assignment: Which input each worker computes, (N,), of a code that assigns; its own if None.

        Returns:
            The plan, for `encode` and `decode`.

        Raises:
            ValueError: If x does not have K inputs of real numbers, or features does not return an array (B, features).
        """
        size = batch_size("x", x)
        if size != self.num_data:
            raise ValueError(f"x has {size} inputs; expected a group of num_data, {self.num_data}")
        data = self._features_of(x)
        process, placing = self._processes(data)
        if self.mixes:
            weight = jnp.ones(self.num_data, data.dtype) if risk is None else jnp.asarray(risk)
            place = compiled_placement(self.num_workers)
            pairs, shares = place(*jax.lax.stop_gradient((data, weight, placing, self.late)))
        else:
            copies = jnp.arange(self.num_workers, dtype=jnp.int32) % self.num_data
            copies = copies if assignment is None else jnp.asarray(assignment, jnp.int32)
            pairs, shares = jnp.stack([copies, copies], axis=1), jnp.zeros(self.num_workers, jnp.float32)
        workers = None
        if self.mixes:
            # Numbers of sums are sums of numbers.
            mix = functools.partial(_mix, pairs=pairs, shares=shares)
            workers = mix(data) if self.features is None else self._features_of(mix(x))
        return Plan(prior=self._prior(), features=KernelContext(pairs, shares, workers, data, process))

    def adapt(self, y: PyTree[ArrayLike], returned: Bool[ArrayLike, "workers"], plans: Plan) -> Plan:
        """Fits the process to the answers to several groups.

        Args:
            y: Answers, leaves (N, groups, ...); rows of workers that did not return are not read.
            returned: Which workers returned, bool (N,).
            plans: The groups' plans, leaves with the groups as leading axis.

        Returns:
            The plans with the process that is most likely for all groups.
        """
        context = self._context(plans)
        num_groups = context.data.shape[0]
        chosen = np.linspace(0, num_groups - 1, min(num_groups, _FITTED_GROUPS)).round().astype(np.int32)
        code, plan = self.join(jax.tree.map(lambda leaf: jnp.asarray(leaf)[chosen], plans))
        y = jax.tree.map(lambda leaf: jnp.asarray(leaf)[:, chosen].reshape(code.num_workers, *np.shape(leaf)[2:]), y)
        values = concatenate_rows(y if plan.prior is None else plan.prior.residuals(y))
        live = jnp.repeat(self._mask(returned), len(chosen))
        sites, _ = _sites(plan.features)
        # Sets of sites drawn from all groups have short distances and long ones.
        size = min(code.num_workers, max(_FITTED_SITES, self.num_workers))
        order = np.random.default_rng(0).permutation(code.num_workers)
        num_sets = min(_FITTED_SETS, code.num_workers // size)
        rows = np.sort(order[: num_sets * size].reshape(num_sets, size), axis=1).astype(np.int32)
        sites, live, values = jax.tree.map(lambda leaf: leaf[rows], (sites, live, values))
        fixed = None if self.process is None else self._context(plan).process
        fit = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (num_groups, *leaf.shape)),
            fit_process(sites, live, values, _has_mean(plan), fixed),
        )
        return dataclasses.replace(plans, features=context._replace(process=fit[0], variances=fit[1]))

    def join(self, plans: Plan) -> "tuple[KernelCode, Plan]":
        """Makes one code and one plan for all inputs of several groups, whose answers then tell about each other.

        Args:
            plans: The groups' plans, leaves with the groups as leading axis.

        Returns:
            The code of groups K inputs and groups N workers, and its plan: input k of group g is the one of number
            k groups + g, and likewise for workers.
        """
        context = self._context(plans)
        num_groups = context.data.shape[0]

        def join(leaf):
            return jnp.swapaxes(jnp.asarray(leaf), 0, 1).reshape(-1, *leaf.shape[2:])

        group = jnp.arange(num_groups, dtype=jnp.int32)[:, None, None]
        process = jax.tree.map(lambda leaf: leaf[0], context.process)
        joined = KernelContext(
            join(context.pairs * num_groups + group),
            join(context.shares),
            jax.tree.map(join, context.workers),
            join(context.data),
            process,
        )
        code = dataclasses.replace(self, num_data=self.num_data * num_groups, num_workers=self.num_workers * num_groups)
        return code, Plan(prior=jax.tree.map(join, plans.prior), features=joined)

    def encoder_linop(self, plan: Plan | None = None) -> AbstractLinop:
        context = self._context(plan)
        pairs, shares = jnp.asarray(context.pairs), jnp.asarray(context.shares)
        if not self.mixes:
            return Gather(pairs[:, 0], self.num_data)
        is_part = pairs[:, :, None] == jnp.arange(self.num_data, dtype=jnp.int32)[None, None]
        parts = jnp.stack([1 - shares, shares], axis=1)[:, :, None]
        return Dense(split(jnp.sum(jnp.where(is_part, parts, 0), axis=1)))

    def decoder_linop(self, returned: Bool[ArrayLike, "workers"], plan: Plan | None = None) -> AbstractLinop:
        mask = self._mask(returned)
        context = self._context(plan)
        weights, _ = _posterior(context, mask, _has_mean(plan))
        return Dense(split(weights), mask, self.recovered(mask))

    def recovered(
        self, returned: Bool[ArrayLike, "workers"], plan: Plan | None = None
    ) -> Bool[Array | np.ndarray, "data"]:
        mask = self._mask(returned)
        return jnp.broadcast_to(jnp.sum(mask, dtype=jnp.int32) >= 2, (self.num_data,))

    def exact(self, returned: Bool[ArrayLike, "workers"], plan: Plan | None = None) -> Bool[Array | np.ndarray, "data"]:
        mask = self._mask(returned)
        pairs = self._context(plan).pairs
        inputs = jnp.arange(self.num_data, dtype=jnp.int32)
        return jnp.any(jnp.all(pairs[None] == inputs[:, None, None], axis=2) & mask[None], axis=1) & self.recovered(
            mask
        )

    def decode_with_error(
        self, y: PyTree[ArrayLike], returned: Bool[ArrayLike, "workers"], plan: Plan | None = None
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """Decodes the answers that came and predicts the error of each result.

        Args:
            y: As for `decode`.
            returned: As for `decode`.
            plan: As for `decode`.

        Returns:
            The results of `decode`, and their standard errors, of the same structure, shapes and unit: the posterior's,
            with the variance of each output estimated from the answers. A prior of one array that says how far off it
            is counts as 20 more answers. Zero where an input's own worker returned.

        Raises:
            ValueError: As for `decode`.
        """
        self._context(plan)
        assert plan is not None
        plan = adapt_group(self, y, returned, plan)
        context = self._context(plan)
        assert context.variances is not None
        results = decode_as_planned(self, y, returned, plan)
        # Products with other numbers stay in JAX's default precision.
        _, factors = _posterior(context, self._mask(returned), _has_mean(plan))
        factors, of_outputs = as_float(factors), as_float(context.variances)
        leaves, structure = jax.tree.flatten(results)
        splits = np.cumsum([leaf.size // self.num_data for leaf in leaves])[:-1]
        variances = [factors[:, None] * part[None] for part in jnp.split(of_outputs, splits)]
        expected = None if plan.prior is None else plan.prior.errors
        if expected is not None and len(leaves) == 1:
            count = jnp.sum(self._mask(returned), dtype=jnp.int32).astype(factors.dtype)
            unexplained = factors / (1 + as_float(context.process.nugget))
            squares = (unexplained * jnp.square(jnp.asarray(expected).astype(factors.dtype)))[:, None]
            variances = [(count * variances[0] + _PRIOR_COUNT * squares) / (count + _PRIOR_COUNT)]
        errors = [
            jnp.sqrt(variance).reshape(leaf.shape).astype(leaf.dtype)
            for leaf, variance in zip(leaves, variances, strict=True)
        ]
        return results, jax.tree.unflatten(structure, errors)

    def _prior(self):
        """Makes the prior of a known mean; None without one."""
        if self.mean is None:
            return None

        def repeat(count):
            return jax.tree.map(lambda leaf: jnp.broadcast_to(jnp.asarray(leaf), (count, *np.shape(leaf))), self.mean)

        return Prior(repeat(self.num_workers), repeat(self.num_data))

    def _features_of(self, x):
        x = as_arrays("x", x)
        for path, node in jax.tree_util.tree_leaves_with_path(x, is_leaf=is_side_input):
            if not is_side_input(node) and not is_real(node.dtype):
                raise ValueError(
                    f"x{jax.tree_util.keystr(path)} has dtype {node.dtype}; expected real numbers, which can be "
                    "mixed: mark what is not to be mixed, such as a mask, as jaxcode.SideInput"
                )
        x = without_marks(x)
        if self.features is not None:
            features = jnp.asarray(self.features(x))
            if features.ndim != 2 or features.shape[0] != batch_size("x", x):
                raise ValueError(f"features returned shape {features.shape}; expected one vector for each input")
        else:
            features = concatenate_rows(x)
        return features if self.metric is None else _apply_metric(features, self.metric)

    def _processes(self, data):
        """Returns the process by which answers are decoded until one is fitted, and the one that places workers."""
        own = jax.tree.map(lambda leaf: as_float(leaf).astype(data.dtype), self.process)
        if self.length is None:
            return own, own
        unit = spread_of(data[None])
        length = unit * jnp.asarray(self.length, unit.dtype)
        rough, smooth = (Process(jnp.full_like(unit, value), length, jnp.zeros_like(unit)) for value in (2.5, 4.5))
        return rough if self.process is None else own, smooth

    def _context(self, plan) -> KernelContext:
        if plan is None or not isinstance(plan.features, KernelContext):
            raise ValueError(f"plan is {plan!r}; expected the group's plan, from this code's `plan(x)`")
        return plan.features

    def _mask(self, returned):
        check_mask("returned", returned, self.num_workers)
        return jnp.asarray(returned)


def _sites(context):
    """Returns the workers' sites and the inputs' places; equal pairs are one site."""
    num_data = context.data.shape[0]
    first, second = context.pairs[:, 0], context.pairs[:, 1]
    # Halfway between two inputs is one site whichever is the first.
    is_half = context.shares == 0.5
    start, end = (
        jnp.where(is_half, f(first, second), pair) for f, pair in ((jnp.minimum, first), (jnp.maximum, second))
    )
    label = jnp.where(is_half, num_data**2, 0) + start * num_data + end
    own = jnp.arange(num_data, dtype=jnp.int32)
    workers = context.data[first] if context.workers is None else context.workers
    return Sites(workers, label.astype(jnp.int32)), Sites(context.data, own * num_data + own)


def _posterior(context, mask, has_mean):
    """Computes the weights of the workers' answers in the results, (K, N), and the variances, (K,)."""
    workers, data = _sites(context)
    if context.workers is not None:
        return posterior(context.process, workers, data, mask, has_mean)
    # Copies are no further sites: the first to return stands for its input.
    num_workers, num_data = mask.shape[0], context.data.shape[0]
    computed, number = context.pairs[:, 0], jnp.arange(num_workers, dtype=jnp.int32)
    first = jnp.full(num_data, num_workers, jnp.int32).at[computed].min(jnp.where(mask, number, num_workers))
    weights, variances = posterior(context.process, data, None, first < num_workers, has_mean)
    return _expand(weights, computed, first[computed] == number), variances


@in_float64
@jax.jit
def _expand(weights, computed, is_first):
    """Brings weights of inputs, (K, K), to the workers that compute them, (K, N)."""
    return jnp.where(is_first[None], weights[:, computed], 0.0)


def _has_mean(plan):
    """Returns 0 where residuals to a prior are decoded, whose mean is zero, else 1."""
    return 1.0 if plan is None or plan.prior is None else 0.0


def _apply_metric(features, metric):
    metric = as_float(metric).astype(features.dtype)
    if metric.shape[0] != features.shape[1]:
        raise ValueError(f"metric has shape {metric.shape}; expected a row for each of {features.shape[1]} features")
    return features * metric[None] if metric.ndim == 1 else matmul(features, metric)


def _mix(x, pairs, shares):
    """Returns points between pairs; of side inputs those of the first."""

    def mix(node):
        if is_side_input(node):
            return SideInput(jax.tree.map(lambda leaf: jnp.asarray(leaf)[pairs[:, 0]], node.values))
        leaf = jnp.asarray(node)
        leaf = leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else as_float(leaf)
        share = shares.reshape(-1, *[1] * (leaf.ndim - 1)).astype(leaf.dtype)
        return (1 - share) * leaf[pairs[:, 0]] + share * leaf[pairs[:, 1]]

    return jax.tree.map(mix, x, is_leaf=is_side_input)
