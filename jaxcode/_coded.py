"""Coded inference as one function: encode, let every worker compute, decode from those that returned."""

import dataclasses
import functools
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree

from ._float64 import x64_is_on
from ._pytree import pytree
from ._sharding import call_with_auto_axes
from .allocation import PriorPlanner, find_planner
from .checks import check_mask, is_static, static_value, warn_not_finite
from .codes import AbstractCode
from .codes.abstract import mixes_inputs
from .functions import Model, Params, PureFunction, as_pure_function
from .ordering import Ordering
from .outputs import OutputSpace, as_returned
from .pipeline import (
    Planner,
    StaticCode,
    decode,
    describe_code,
    encode,
    find_decoder,
    group,
    group_with_prior,
    make_plans,
    transform_prior,
    ungroup,
)
from .placement import AbstractPlacement, vmap
from .robust import Defence, Detection
from .robust.detection import detect, keeps_evidence
from .stragglers import AbstractStragglers
from .surrogates import Surrogate
from .surrogates.calibration import SQUARED_ERROR


def coded(
    f: Model,
    code: AbstractCode,
    *,
    order: Ordering | None = None,
    output: OutputSpace = as_returned,
    defence: Defence | None = None,
    planner: Planner | None = None,
    prior: Surrogate | None = None,
    stragglers: AbstractStragglers | None = None,
    loss: str = SQUARED_ERROR,
    placement: AbstractPlacement | None = None,
) -> "Coded":
    r"""Wraps a model so that its results are decoded from the workers that returned.

    The batch is cut into groups of K inputs, in its own order unless another is asked for (the last group is padded
    with its last input); each group is encoded into N coded inputs, worker n computes f on its coded inputs of all
    :math:`\lceil B/K \rceil` groups, and the results are decoded from the workers that returned.

    The returned function is compiled on first use and composes with jit, vmap, grad, jacfwd and remat. A new mask does
    not recompile, nor does another call of `coded` for a model of the same structure, after a training step for
    instance, if code and options are equal. A lambda equals only itself: create it once and pass the
    same object again. Further arguments of a model are given by `functools.partial(model, train=False)`.

    Args:
        f: A callable, an `nnx.Module` or a pair (linen module, variables), used in evaluation mode. It takes a batch
            and returns one: any pytree of arrays with a leading axis. Its results must be real numbers where the code
            mixes them; logits decode better than probabilities. A module's parameters are read by this call: after
            training, call `coded` again.
        code: How inputs become coded inputs and answers become results.
        order: In which order the batch is cut into groups: a function from (x, K) to a permutation of the batch, traced
            with the rest; no derivatives pass through it. `jaxcode.ordering.greedy` puts similar inputs next to each
            other; with a code that mixes inputs, most of the accuracy is due to it. Results keep the batch's order.
        output: In which space answers are decoded; `jaxcode.outputs.logits` for a model that returns probabilities.
            Results are in the space of what the model returns.
        defence: Detects wrong answers: `jaxcode.robust.leave_one_out` flags faulty workers by their answers to the
            whole batch, and these are treated as if they had not returned. If None, all workers are trusted.
        planner: Plans each group: a function, traced, from (code, group of inputs) to the `Plan` with which the group
            is encoded and decoded. None for codes that need none, and where there is a prior.
        prior: Guesses f's answers, such as `jaxcode.surrogate(f, inputs)`. What is decoded is the difference between
            answers and guesses; a result that cannot be recovered is its guess, approximate, instead of NaN.
        stragglers: Which workers are late, such as `jaxcode.stragglers.Uniform(5)`; needs a prior and a code that
            assigns inputs to workers. Every input then still has a worker of its own, and the other workers compute
            copies of those inputs whose guesses are worst. A batch of several groups is cut so that each has its share
            of bad guesses, if no order is given.
        loss: What a bad guess costs, for `stragglers`: "squared_error", or for a classifier "disagreement".
        placement: On which devices workers compute: `jaxcode.placement.shard_map(mesh)` spreads them over a mesh. If
            None, `jaxcode.placement.vmap()`: all as one batch on one device.

    Returns:
        A function `predict(x, returned=None)`; see `Coded`.

    Raises:
        ValueError: If f or code is none of these, prior is no surrogate or cannot estimate the loss, or stragglers is
            given without a prior or for a code whose workers serve all inputs, or prior is given beside a planner.

    References:
        arXiv 2406.00300, section 3; `jaxcode.allocation` for copies.

    >>> import jax.numpy as jnp
    >>> from jaxcode import SplineCode
    >>> predict = coded(jnp.sin, SplineCode.chebyshev(num_data=4, num_workers=12))
    >>> returned = jnp.arange(12) % 3 != 0  # four of the twelve never answer
    >>> x = jnp.linspace(0.0, 1.0, 4)
    >>> float(jnp.max(jnp.abs(predict(x, returned) - jnp.sin(x)))) < 0.01
    True
    """
    if not isinstance(code, AbstractCode):
        raise ValueError(f"code is {code!r}; expected a code such as SplineCode.chebyshev(num_data=20, num_workers=30)")
    fn, params = as_pure_function(f)
    if prior is not None and planner is not None:
        raise ValueError(f"prior is given beside planner, {planner!r}; expected one of them")
    prior_planner = find_planner(code, prior, stragglers, loss)
    static_code, traced_code = (StaticCode(code), None) if is_static(code) else (None, code)
    setting = Setting(fn, static_code, order, output, defence, planner, vmap() if placement is None else placement)
    return Coded(params, traced_code, prior_planner, setting)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Holds the static part of a coded model: models with equal settings share one compiled program.

    Attributes:
        fn: The model without its parameters.
        static_code: The code if it is static, else None.
        order: As for `coded`.
        output: As for `coded`.
        defence: As for `coded`.
        planner: As for `coded`.
        placement: As for `coded`.
    """

    fn: PureFunction
    static_code: StaticCode | None
    order: Ordering | None
    output: OutputSpace
    defence: Defence | None
    planner: Planner | None
    placement: AbstractPlacement

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self):
        return hash(self._values())

    def __reduce__(self):
        # Without the hash, which differs between processes.
        return Setting, self._values()

    def _values(self):
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


_DEFAULTS = {"output": as_returned, "placement": vmap()}


@final
@pytree("setting", eq=False)
class Coded:
    """Computes a model's results from the workers that returned; made by `coded`.

    A pytree whose leaves are the model's parameters, those of its prior, and the code's nodes and smoothing where they
    are traced: it can be passed to jitted functions, donated, mapped over with `jax.tree.map` and pickled with
    cloudpickle.

    Attributes:
        params: The model's parameters.
        traced_code: The code if it is not static, else None.
        prior_planner: Guesses answers and assigns inputs to workers; None without a prior.
        setting: The static part: the model's function and the options of `coded`.
    """

    params: Params
    traced_code: AbstractCode | None
    prior_planner: PriorPlanner | None
    setting: Setting

    @property
    def code(self) -> AbstractCode:
        """The code."""
        static = self.setting.static_code
        assert static is not None or self.traced_code is not None
        return self.traced_code if static is None else static.code  # pyright: ignore[reportReturnType]

    def __repr__(self) -> str:
        setting = self.setting
        parts = [f"code={describe_code(self.code)}", f"parameters={sum(map(np.size, jax.tree.leaves(self.params)))}"]
        for name in ("order", "output", "defence", "planner", "placement"):
            value = getattr(setting, name)
            if value is not None and value != _DEFAULTS.get(name):
                parts.append(f"{name}={_name_of(value)}")
        if self.prior_planner is not None:
            parts.append(f"prior={self.prior_planner.prior}")
        return f"Coded({', '.join(parts)})"

    def __call__(self, x: PyTree[ArrayLike], returned: Bool[ArrayLike, "workers"] | None = None) -> PyTree[Array]:
        """Computes a batch's results from the workers that returned.

        Args:
            x: The batch, leaves (B, ...). With a code that mixes inputs, one that is NaN or infinite makes the results
                of its whole group NaN; of those in NumPy arrays a `RuntimeWarning` tells which they are.
            returned: Which workers returned, bool (N,); all if not given.

        Returns:
            The results, leaves (B, ...). Where the code cannot recover an input from these answers (an interpolating
            code from fewer than two), its results are NaN.

        Raises:
            ValueError: If x has no leaves, its leading axes differ or are 0, its dtype cannot be mixed, returned is not
                bool (N,), f does not return real numbers with its batch as leading axis, or order does not return whole
                numbers (B,).
        """
        return self._compute(x, returned)[0]

    def inspect(
        self,
        x: PyTree[ArrayLike],
        returned: Bool[ArrayLike, "workers"] | None = None,
        evidence: Float[ArrayLike, "workers"] | None = None,
    ) -> tuple[PyTree[Array], Detection | None]:
        """Computes a batch's results and returns which workers the defence flagged.

        Args:
            x: As for a call.
            returned: As for a call.
            evidence: What earlier calls said about each worker, the `evidence` of the last detection, for a defence
                that gathers it (`jaxcode.robust.SequentialTest`); None for the first call.

        Returns:
            The results, and the defence's detection; None without a defence.

        Raises:
            ValueError: As for a call, or if there is evidence and the defence gathers none.
        """
        if evidence is not None and not keeps_evidence(self.setting.defence):
            raise ValueError(
                f"evidence is given, but defence is {_name_of(self.setting.defence)}; expected one that gathers it, "
                "such as jaxcode.robust.SequentialTest()"
            )
        return self._compute(x, returned, evidence)

    def exact(self, x: PyTree[ArrayLike], returned: Bool[ArrayLike, "workers"] | None = None) -> Bool[Array, "batch"]:
        """Returns which results of a call are f's answers to the inputs themselves, all others being approximate.

        The batch is grouped and planned as in a call, but f is not computed.

        Args:
            x: As for a call.
            returned: As for a call. A defence, which trusts workers by their answers, is not asked.

        Returns:
            bool, (B,).

        Raises:
            ValueError: As for a call.

        >>> import jax.numpy as jnp
        >>> from jaxcode import ReplicationCode
        >>> predict = coded(jnp.sin, ReplicationCode(num_data=2, num_workers=3))
        >>> predict.exact(jnp.zeros(4), jnp.array([True, False, True]))
        Array([ True, False,  True, False], dtype=bool)
        """
        returned = _all_workers(self.code.num_workers) if returned is None else returned
        check_mask("returned", returned, self.code.num_workers)
        mask = static_value(returned)
        returned = returned if mask is None else jax.device_put(mask)
        return _exact(self.setting, self.traced_code, self.prior_planner, x, returned)

    @property
    def _is_planned(self):
        return self.setting.planner is not None or self.prior_planner is not None or self.code.needs_plan

    def _compute(self, x, returned, evidence=None):
        setting = self.setting
        num_workers = self.code.num_workers
        if returned is None:
            returned = _all_workers(num_workers)
        check_mask("returned", returned, num_workers)
        if evidence is None and keeps_evidence(setting.defence):
            evidence = np.zeros(num_workers, np.float32)
        # It may be the host's.
        evidence = None if evidence is None else jax.device_put(evidence)
        warn_not_finite("x", x, lambda: mixes_inputs(self.code), stacklevel=4)
        # A copy: what is dispatched may run after the caller has changed the array.
        mask = static_value(returned)
        if mask is None:
            decoder, mask = None, returned
        elif setting.static_code is None or setting.defence is not None or self._is_planned:
            decoder, mask = None, jax.device_put(mask)
        else:
            decoder, mask = find_decoder(setting.static_code, mask.tobytes(), x64_is_on()), None
        return _run(setting, self.params, self.traced_code, self.prior_planner, x, decoder, mask, evidence)


@functools.cache
def _all_workers(num_workers):
    return np.ones(num_workers, bool)


def _name_of(option):
    return getattr(option, "__name__", getattr(option, "name", option))


@functools.partial(jax.jit, static_argnums=0)
def _run(setting, params, traced_code, prior_planner, x, decoder, returned, evidence):
    def specs(batch):
        # Results are sharded along the batch as the inputs are; the detection is on every device.
        return PartitionSpec(*jax.tree.leaves(batch)[0][:1]), PartitionSpec()

    def run(x, *arguments):
        return _run_with_auto_axes(setting, x, *arguments)

    return call_with_auto_axes(run, x, params, traced_code, prior_planner, decoder, returned, evidence, specs=specs)


@functools.partial(jax.jit, static_argnums=0)
def _exact(setting, traced_code, prior_planner, x, returned):
    def specs(batch):
        return PartitionSpec(*jax.tree.leaves(batch)[0][:1])

    def find(x, traced_code, prior_planner, returned):
        code = traced_code if setting.static_code is None else setting.static_code.code
        _, grouping, plans = _group(setting, code, prior_planner, x)
        if plans is None:
            exact = jnp.broadcast_to(code.exact(returned), (grouping.num_groups, code.num_data))
        else:
            exact = jax.vmap(lambda plan: jnp.asarray(code.exact(returned, plan)))(plans)
        return ungroup(exact.T, grouping)

    return call_with_auto_axes(find, x, traced_code, prior_planner, returned, specs=specs)


def _group(setting, code, prior_planner, x):
    """Groups a placed batch and plans its groups; no plans without a planner or a prior."""
    if prior_planner is None:
        grouped, grouping = group(x, code.num_data, setting.order)
        return grouped, grouping, make_plans(code, setting.planner, grouped)
    return group_with_prior(code, prior_planner, x, setting.order)


def _run_with_auto_axes(setting, x, params, traced_code, prior_planner, decoder, returned, evidence):
    code = traced_code if setting.static_code is None else setting.static_code.code
    placement = setting.placement
    grouped, grouping, plans = _group(setting, code, prior_planner, placement.place(x))
    coded_inputs = encode(code, None, grouped, plans, one_pass=placement.is_distributed)
    answers = placement.answer(setting.fn, params, coded_inputs)
    detection = None
    if setting.defence is not None:
        transformed, own_plans = setting.output.transform(answers), transform_prior(plans, setting.output)
        detection = detect(setting.defence, code, transformed, returned, plans=own_plans, evidence=evidence)
        returned = detection.trusted
    results = decode(code, decoder, answers, setting.output, returned, plans, one_pass=placement.is_distributed)
    return ungroup(results, grouping), detection
