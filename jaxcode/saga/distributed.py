"""Defines the method of distributed SAGA."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, final

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from .._pytree import pytree
from ._blocks import Iterate, blocked_steps
from ._tables import append_axes, compensated_add, first_occurrences
from .gradients import gradients_of
from .linear import LinearLoss
from .method import AbstractMethod, Loss, check_method
from .shards import sample_mask
from .step_size import lipschitz_step_size, saga_step_size, smoothness

# The weight theta_k of the change of a machine's sum since machines last synchronised, from the number of its samples
# and that of all samples.
_CORRECTIONS = {
    "anchored": lambda size, num_samples: 1 / size,
    "own": lambda size, num_samples: jnp.ones_like(size) / num_samples,
    "frozen": lambda size, num_samples: jnp.zeros_like(size),
    "local": lambda size, num_samples: 1 / size,
}


@final
@pytree(
    "loss", "num_machines", "period", "correction", "sampling", "batch_size", "prox", "shard_sizes", "mesh", eq=False
)
class DistributedSaga(AbstractMethod):
    r"""Trains by SAGA on machines that synchronise once a round: a linear rate with little communication.

    .. math:: F(w) = \frac{1}{n} \sum_{i=1}^n \phi_i(w) + \frac{\lambda}{2} \|w\|^2

    Machine k stores the last gradient a_j of each of its m_k samples and their sum s_k. When all machines synchronise,
    w becomes the same everywhere, :math:`c = \frac{1}{n} \sum_l s_l` becomes the mean of all tables, and the machine
    stores :math:`s_k^0 = s_k`. Then, period times, it draws one of its samples and with the old values computes

    .. math::
        \delta = \phi_j'(w_k) - a_j, \quad
        w_k \leftarrow w_k - \gamma \bigl(\delta + c + \theta_k (s_k - s_k^0) + \lambda w_k\bigr), \quad
        s_k \leftarrow s_k + \delta, \quad a_j \leftarrow a_j + \delta,

    and all synchronise again: one sum over machines of 2 d numbers, :math:`w = \sum_k \frac{m_k}{n} w_k` and c.

    Only the abstract of the first reference was available. It states the aim, SAGA on several machines whose linear
    rate survives when they seldom communicate, but not the update: this one is a reconstruction. Its derivation: SAGA's
    estimate of the mean gradient is a new difference plus the mean of the table; between two synchronisations, a
    machine can update only its own part of that mean. If this part counts as what it is, a share of the whole, the
    correction is "own"; if it counts as if all other machines had changed alike, the correction is "anchored". At the
    optimum all differences vanish, whatever the correction, and parameters do not change. With a period of 1 both
    corrections are the same, and with one machine both are plain SAGA.

    The guarantee is that of a period of 1: with steps of 1/(3 L) the expected squared distance from the optimum
    decreases at least by the factor :math:`1 - \min(K / (4 n), \mu / (3 L))` a step. For longer periods the rate is
    measured, not proven: "own" diverges where the period is long and there are more than two machines; "anchored"
    contracts whatever the period and however machines differ. Where they differ and the period is long, steps shorter
    than the default save rounds, as a machine that moves far uses an outdated mean of the others' tables: a9a sorted by
    label over eight machines, with a period of 64, needs a quarter of the rounds with a tenth of the default.

    A machine that misses a round keeps its table, and the others continue with its last message. Its samples' part of c
    is then outdated, so that machines that miss rounds at random slow the method down, and a machine that stays
    away forever makes it converge to the optimum of a problem in which that machine's losses are linear.

    Attributes:
        loss: From parameters and one sample to one number. For a `LinearLoss` the table stores one number for each
            sample (and class); otherwise it stores gradients.
        num_machines: K.
        period: Steps between two synchronisations.
        ridge: :math:`\lambda`, evaluated exactly, not from the tables.
        correction: "anchored", :math:`\theta_k = 1 / m_k`; "own", 1/n; "frozen", 0. For comparisons also "local":
            machines use the mean of their own tables in place of c, which is SAGA on each alone and a mean of
            parameters.
        sampling: "uniform", or "lipschitz": samples whose gradients change faster are drawn more often, with
            probabilities :math:`p_j \propto L_j + m_k \lambda / 3`, and :math:`\delta` is divided by :math:`m_k p_j` in
            the step, not in table and sum. Steps can then be as long as the mean of L allows, not its maximum, which
            saves most epochs where samples differ in length. Needs a `LinearLoss` of known curvature.
        step_size: :math:`\gamma`; if None, 1 / (3 (max L_i + ridge)), and for "lipschitz" sampling
            :math:`1 / (3 (\max_j L_j / (m_k p_j) + \lambda))`. Both defaults need a `LinearLoss` of known curvature.
        batch_size: Samples of one step, drawn with replacement, over whose differences the mean is taken.
        prox: A proximal operator, from parameters and the step's length to parameters, that is applied after each
            step, such as `soft_threshold` returns; none if None.
        shard_sizes: As for `AbstractMethod`.
        mesh: As for `AbstractMethod`.

    Raises:
        ValueError: If a number makes no sense, or correction or sampling is none of the strings above.

    References:
        Calauzènes and Le Roux, Distributed SAGA: Maintaining linear convergence rate with limited communication, arXiv
        1705.10405. Defazio, Bach and Lacoste-Julien, arXiv 1407.0202 (SAGA, and the rate above for one machine).
        Gower, Richtárik and Bach, arXiv 1805.02632, section 6 (the probabilities, but for constants).

    >>> from jaxcode.saga import squared
    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]])
    >>> method = DistributedSaga(squared, num_machines=2, period=2, ridge=0.1)
    >>> state = method.init(jnp.zeros(2), (x, x @ jnp.array([1.0, 2.0])))
    >>> state, history = method.run(state, jax.random.key(0), num_rounds=200, progress=False)
    >>> optimum = jnp.linalg.solve(x.T @ x / 4 + 0.1 * jnp.eye(2), x.T @ x @ jnp.array([1.0, 2.0]) / 4)
    >>> bool(jnp.allclose(state.params, optimum, atol=1e-5))
    True
    """

    loss: Loss
    num_machines: int
    period: int
    ridge: Any = 0.0
    correction: Literal["anchored", "own", "frozen", "local"] = "anchored"
    sampling: Literal["uniform", "lipschitz"] = "uniform"
    step_size: Any = None
    batch_size: int = 1
    prox: Callable[[PyTree[Array], Array], PyTree[Array]] | None = None
    shard_sizes: Sequence[int] | None = None
    mesh: Mesh | None = None

    def __post_init__(self):
        check_method(self)
        if self.correction not in _CORRECTIONS:
            raise ValueError(f"correction is {self.correction!r}; expected one of {', '.join(map(repr, _CORRECTIONS))}")
        if self.sampling not in ("uniform", "lipschitz"):
            raise ValueError(f"sampling is {self.sampling!r}; expected 'uniform' or 'lipschitz'")
        if self.sampling == "lipschitz" and (not isinstance(self.loss, LinearLoss) or self.loss.curvature is None):
            raise ValueError(
                "sampling is 'lipschitz', but loss is no LinearLoss whose curvature is known; use 'uniform'"
            )

    def begin(self, common, machine):
        gradients = gradients_of(self.loss, common.w, common.unravel)
        table = gradients.entries(common.w, machine.samples)
        is_sample = append_axes(sample_mask(table.shape[0], machine.size), table)
        message = gradients.total(jnp.where(is_sample, table, 0), machine.samples)
        local = {"table": table, "compensation": jnp.zeros_like(message)}
        if self.sampling == "lipschitz":
            params = common.unravel(common.w)
            local["cumulative"] = jnp.cumsum(self._probabilities(params, machine.samples, machine.size))
        return local, message

    def work(self, common, machine, key):
        size = machine.size.astype(common.w.dtype)
        weight = _CORRECTIONS[self.correction](size, common.num_samples)
        mean = machine.message / size if self.correction == "local" else common.message_sum / common.num_samples
        index, scale = self._draw(machine, key)
        use_blocks = isinstance(self.loss, LinearLoss) and self.batch_size == 1 and self.prox is None
        steps = self._blocked_steps if use_blocks else self._single_steps
        w, sum_change, table = steps(common, machine, index, scale, mean, weight)
        message, compensation = compensated_add(machine.message, machine.local["compensation"], sum_change)
        # A machine that is not active may compute with garbage; steps do not change its table.
        compensation = jnp.where(machine.active, compensation, machine.local["compensation"])
        return w - common.w, {**machine.local, "table": table, "compensation": compensation}, message

    def default_step_size(self, params, shards):
        if self.sampling == "uniform":
            return lipschitz_step_size(self.loss, self.ridge, params, shards)
        p = jax.vmap(self._probabilities, (None, 0, 0))(params, shards.samples, shards.sizes)
        sizes = shards.sizes.astype(p.dtype)[:, None]
        bounds = smoothness(self.loss, params, shards.samples[0]) / (sizes * jnp.where(p > 0, p, jnp.inf))
        return saga_step_size(jnp.max(bounds) + self.ridge)

    def _probabilities(self, params, samples, size):
        """Returns the probabilities with which a machine's samples are drawn."""
        bounds = smoothness(self.loss, params, samples[0])
        is_sample = sample_mask(bounds.size, size)
        p = jnp.where(is_sample, bounds + size.astype(bounds.dtype) * self.ridge / 3, 0)
        # Uniform where all samples are zero.
        p = jnp.where(jnp.sum(p) > 0, p, is_sample.astype(p.dtype))
        return p / jnp.sum(p)

    def _draw(self, machine, key):
        """Draws samples for all steps, and the factors of their differences in the step, (period, batch) each."""
        shape = self.period, self.batch_size
        if self.sampling == "uniform":
            # The modulus makes probabilities differ by a factor of at most 1 + m / 2^32.
            index = jax.random.bits(key, shape, jnp.uint32) % machine.size.astype(jnp.uint32)
            return index.astype(jnp.int32), jnp.ones(shape, machine.message.dtype)
        cumulative = machine.local["cumulative"]
        position = jax.random.uniform(key, shape, cumulative.dtype) * cumulative[-1]
        index = jnp.searchsorted(cumulative, position, side="right").astype(jnp.int32)
        index = jnp.minimum(index, machine.size.astype(jnp.int32) - 1)
        p = cumulative[index] - jnp.where(index > 0, cumulative[index - 1], 0)
        return index, cumulative[-1] / (machine.size.astype(p.dtype) * p)

    def _single_steps(self, common, machine, index, scale, mean, weight):
        gradients = gradients_of(self.loss, common.w, common.unravel)

        def step(t, carry):
            w, sum_change, table = carry
            batch_index = index[t]
            samples = jax.tree.map(lambda leaf: leaf[batch_index], machine.samples)
            old = table[batch_index]
            new = jnp.where(machine.active, gradients.entries(w, samples), old)
            change = new - old
            scaled_change = append_axes(scale[t].astype(change.dtype), change) * change
            estimate = (
                gradients.total(scaled_change, samples) / self.batch_size + mean + weight * sum_change + self.ridge * w
            )
            w = w - common.step_size * estimate
            if self.prox is not None:
                w = ravel_pytree(self.prox(common.unravel(w), common.step_size))[0]
            first_change = jnp.where(append_axes(first_occurrences(batch_index), change), change, 0)
            return w, sum_change + gradients.total(first_change, samples), table.at[batch_index].set(new)

        start = common.w, jnp.zeros_like(common.w), machine.local["table"]
        return jax.lax.fori_loop(0, self.period, step, start)

    def _blocked_steps(self, common, machine, index, scale, mean, weight):
        assert isinstance(self.loss, LinearLoss)
        bias = isinstance(common.unravel(common.w), Mapping)

        def stack(w):
            params = common.unravel(w)
            kernel = params["kernel"] if bias else params
            rows = jnp.atleast_2d(kernel.T)
            return jnp.concatenate([rows, params["bias"].reshape(-1, 1)], axis=1) if bias else rows

        def unstack(matrix):
            params = common.unravel(common.w)
            if not bias:
                return ravel_pytree(matrix.T.reshape(params.shape))[0]
            parts = {"kernel": matrix[:, :-1].T, "bias": matrix[:, -1]}
            # Mapped over params, because mappings differ in the order of their leaves.
            return ravel_pytree(jax.tree.map_with_path(lambda path, p: parts[path[0].key].reshape(p.shape), params))[0]

        start = Iterate(stack(common.w), stack(jnp.zeros_like(common.w)), machine.local["table"])
        w, sum_change, table = blocked_steps(
            start,
            jax.grad(self.loss.margin_loss),
            machine.samples,
            index[:, 0],
            scale[:, 0],
            stack(mean),
            weight,
            self.ridge,
            common.step_size,
            active=machine.active,
            bias=bias,
        )
        return unstack(w), unstack(sum_change), table


def soft_threshold(strength: float) -> Callable[[PyTree[Array], Array], PyTree[Array]]:
    r"""Returns the proximal operator of :math:`\alpha \|w\|_1`, for the prox of `DistributedSaga`.

    .. math:: w \mapsto \mathrm{sign}(w) \max(|w| - \gamma \alpha, 0)

    Args:
        strength: :math:`\alpha`, a number of 0 or more.

    Returns:
        A function of parameters and a step's length :math:`\gamma`.
    """

    def prox(params, step_size):
        return jax.tree.map(lambda w: jnp.sign(w) * jnp.maximum(jnp.abs(w) - step_size * strength, 0), params)

    return prox
