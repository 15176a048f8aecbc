"""Distributed SAGA."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, final

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from .._pytree import pytree
from ._blocks import Walk, walk_in_blocks
from ._tables import add, along, first_of_each
from .gradients import gradients_of
from .linear import LinearLoss
from .method import AbstractMethod, Loss, check_method, default_step

# The weight of what a machine's sum has changed by since the last meeting, of how many samples it has and all have.
_CORRECTIONS = {
    "anchored": lambda size, num_samples: 1 / size,
    "own": lambda size, num_samples: 1 / num_samples,
    "frozen": lambda size, num_samples: 0.0,
    "local": lambda size, num_samples: 1 / size,
}


@final
@pytree(
    "loss", "num_machines", "period", "correction", "sampling", "batch_size", "prox", "shard_sizes", "mesh", eq=False
)
class DistributedSaga(AbstractMethod):
    r"""SAGA whose machines work from tables of their own and meet once a round: a linear rate, little communication.

    .. math:: F(w) = \frac{1}{n} \sum_{i=1}^n \phi_i(w) + \frac{\lambda}{2} \|w\|^2

    Machine k remembers the last gradient a_j of each of its m_k samples and their sum s_k. When all have met, w is the
    same everywhere, :math:`c = \frac{1}{n} \sum_l s_l` is the mean of all tables, and the machine remembers
    :math:`s_k^0 = s_k`. Then, period times, it draws one of its samples and with the old values goes

    .. math::
        \delta = \phi_j'(w_k) - a_j, \quad
        w_k \leftarrow w_k - \gamma \bigl(\delta + c + \theta_k (s_k - s_k^0) + \lambda w_k\bigr), \quad
        s_k \leftarrow s_k + \delta, \quad a_j \leftarrow a_j + \delta,

    and all meet again: one sum over machines of 2 d numbers, :math:`w = \sum_k \frac{m_k}{n} w_k` and c.

    Only the abstract of the first reference could be had, which states the aim, SAGA on several machines whose linear
    rate survives when they communicate seldom, but not the update: this one is a reconstruction. Its derivation: SAGA's
    estimate of the mean gradient is a fresh difference plus the mean of the table; a machine that has not heard of the
    others since the last meeting can keep fresh only its own part of that mean. Where it counts as what it is, a share
    of the whole, the correction is "own"; where it counts as if all other machines had changed alike, "anchored". At
    the optimum all differences vanish, whatever the correction, and nobody moves. With a period of 1 all corrections
    are the same, and with one machine they are plain SAGA.

    The guarantee is that of a period of 1: with steps of 1/(3 L) the squared distance from the optimum falls at least
    by the factor :math:`1 - \min(K / (4 n), \mu / (3 L))` a step, in the mean. For longer periods the rate is measured,
    not proven: "own" diverges where the period is long and there are more than two machines, "anchored" contracts
    whatever the period and however machines differ. Where they do and the period is long, steps shorter than the
    default save rounds, as whoever goes far on its own goes by old news of the others: a9a sorted by label over eight
    machines, with a period of 64, is solved in a quarter of the rounds with a tenth of it.

    A machine that misses a round keeps its table, and the others go on with what it told them last. Its samples' part
    of c is as old as that, so that machines that miss rounds at random slow the method down, and one that stays away
    for ever leaves it at the optimum of a problem in which that machine's losses are straight lines.

    Attributes:
        loss: Of parameters and one sample. For a `LinearLoss` the table holds one number for each sample (and class);
            else it holds gradients.
        num_machines: K.
        period: Steps from one meeting to the next.
        ridge: :math:`\lambda`, taken exactly, not from the tables.
        correction: "anchored", :math:`\theta_k = 1 / m_k`; "own", 1/n; "frozen", 0. And, to compare, "local": machines
            that use the mean of their own tables in place of c, which is SAGA on each alone and a mean of parameters.
        sampling: "uniform", or "lipschitz": samples whose gradients change faster are drawn more often, with
            probabilities :math:`p_j \propto L_j + m_k \lambda / 3`, and :math:`\delta` is divided by :math:`m_k p_j` in
            the step, not in table and sum. Steps can then be as long as the mean of L allows, not its maximum, which
            saves most epochs where samples differ in length. Needs a `LinearLoss` of known curvature.
        step_size: :math:`\gamma`; if None, 1 / (3 (max L_i + ridge)), and where "lipschitz" samples,
            :math:`1 / (3 (\max_j L_j / (m_k p_j) + \lambda))`. That needs a `LinearLoss` of known curvature.
        batch_size: Samples of one step, drawn with replacement, of whose differences the mean is taken.
        prox: A proximal operator, of parameters and the step's length, that follows each step, such as `soft_threshold`
            gives; none if None.
        shard_sizes: As for `AbstractMethod`.
        mesh: As for `AbstractMethod`.

    Raises:
        ValueError: If a number is not what it should be, or correction is none of these.

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

    def _begin(self, common, machine):
        gradients = gradients_of(self.loss, common.w, common.unravel)
        table = gradients.entries(common.w, machine.samples)
        own = jnp.arange(table.shape[0]) < machine.size
        total = gradients.total(jnp.where(along(own, table), table, 0), machine.samples)
        keeps = {"table": table, "rest": jnp.zeros_like(total)}
        if self.sampling == "lipschitz":
            keeps["up_to"] = jnp.cumsum(self._probabilities(common.unravel(common.w), machine.samples, machine.size))
        return keeps, total

    def _probabilities(self, params, samples, size):
        """Of a machine's samples to be drawn."""
        smooth = self._smoothness(params, samples)
        own = jnp.arange(smooth.size) < size
        wanted = jnp.where(own, smooth + size * self.ridge / 3, 0)
        # Alike where no sample has any length.
        wanted = jnp.where(jnp.sum(wanted) > 0, wanted, own)
        return wanted / jnp.sum(wanted)

    def _default_step_size(self, params, shards):
        if self.sampling == "uniform":
            return super()._default_step_size(params, shards)
        p = jax.vmap(self._probabilities, (None, 0, 0))(params, shards.samples, shards.sizes)
        divided = self._smoothness(params, shards.samples) / (shards.sizes[:, None] * jnp.where(p > 0, p, jnp.inf))
        return default_step(jnp.max(divided) + self.ridge)

    def _draw(self, machine, key):
        """Samples for all steps, and by what their differences are multiplied in the step, (period, batch) each."""
        shape = self.period, self.batch_size
        if self.sampling == "uniform":
            # No sample is drawn more often than another by a larger share than m / 2^32.
            index = jax.random.bits(key, shape, jnp.uint32) % machine.size.astype(jnp.uint32)
            return index.astype(jnp.int32), jnp.ones(shape, machine.told.dtype)
        up_to = machine.own["up_to"]
        place = jax.random.uniform(key, shape, up_to.dtype) * up_to[-1]
        index = jnp.minimum(jnp.searchsorted(up_to, place, side="right"), machine.size - 1)
        p = up_to[index] - jnp.where(index > 0, up_to[index - 1], 0)
        return index, up_to[-1] / (machine.size * p)

    def _work(self, common, machine, key):
        # Of what the machine's own sum has moved by since all sums were added.
        weight = jnp.asarray(_CORRECTIONS[self.correction](machine.size, common.num_samples), common.w.dtype)
        mean = machine.told / machine.size if self.correction == "local" else common.shared / common.num_samples
        index, scale = self._draw(machine, key)
        in_blocks = isinstance(self.loss, LinearLoss) and self.batch_size == 1 and self.prox is None
        walk = self._in_blocks if in_blocks else self._one_by_one
        w, moved, table = walk(common, machine, index, scale, mean, weight)
        told, rest = add(machine.told, machine.own["rest"], moved)
        # Who is not here may have worked on garbage; tables are left alone by the steps themselves.
        rest = jnp.where(machine.share > 0, rest, machine.own["rest"])
        return w - common.w, {**machine.own, "table": table, "rest": rest}, told

    def _one_by_one(self, common, machine, index, scale, mean, weight):
        gradients = gradients_of(self.loss, common.w, common.unravel)

        def step(t, carry):
            w, moved, table = carry
            chosen = index[t]
            samples = jax.tree.map(lambda leaf: leaf[chosen], machine.samples)
            old = table[chosen]
            new = jnp.where(machine.share > 0, gradients.entries(w, samples), old)
            change = new - old
            scaled = along(scale[t].astype(change.dtype), change) * change
            estimate = gradients.total(scaled, samples) / self.batch_size + mean + weight * moved + self.ridge * w
            w = w - common.step_size * estimate
            if self.prox is not None:
                w = ravel_pytree(self.prox(common.unravel(w), common.step_size))[0]
            once = jnp.where(along(first_of_each(chosen), change), change, 0)
            return w, moved + gradients.total(once, samples), table.at[chosen].set(new)

        begin = common.w, jnp.zeros_like(common.w), machine.own["table"]
        return jax.lax.fori_loop(0, self.period, step, begin)

    def _in_blocks(self, common, machine, index, scale, mean, weight):
        assert isinstance(self.loss, LinearLoss)
        bias = isinstance(common.unravel(common.w), Mapping)

        def matrix(w):
            params = common.unravel(w)
            kernel = params["kernel"] if bias else params
            by_class = jnp.atleast_2d(kernel.T)
            return jnp.concatenate([by_class, params["bias"].reshape(-1, 1)], axis=1) if bias else by_class

        def vector(matrix):
            params = common.unravel(common.w)
            if not bias:
                return ravel_pytree(matrix.T.reshape(params.shape))[0]
            parts = {"kernel": matrix[:, :-1].T, "bias": matrix[:, -1]}
            # In the mapping's own order, whichever that is.
            return ravel_pytree(jax.tree.map_with_path(lambda path, p: parts[path[0].key].reshape(p.shape), params))[0]

        begin = Walk(matrix(common.w), matrix(jnp.zeros_like(common.w)), machine.own["table"])
        w, moved, table = walk_in_blocks(
            begin,
            jax.grad(self.loss.of_margin),
            machine.samples,
            index[:, 0],
            scale[:, 0],
            matrix(mean),
            weight,
            self.ridge,
            common.step_size,
            here=machine.share > 0,
            bias=bias,
        )
        return vector(w), vector(moved), table


def soft_threshold(strength: float) -> Callable[[PyTree[Array], Array], PyTree[Array]]:
    r"""The proximal operator of :math:`\alpha \|w\|_1`, for `DistributedSaga`'s prox.

    .. math:: w \mapsto \mathrm{sign}(w) \max(|w| - \gamma \alpha, 0)

    Args:
        strength: :math:`\alpha`.

    Returns:
        A function of parameters and a step's length :math:`\gamma`.
    """

    def prox(params, step_size):
        return jax.tree.map(lambda w: jnp.sign(w) * jnp.maximum(jnp.abs(w) - step_size * strength, 0), params)

    return prox
