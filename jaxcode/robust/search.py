"""The search for liars by leave-one-out residuals; `jaxcode.robust.leave_one_out` says what it searches for.

All in float64.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..interpolants.abstract import SAME_SITE

# Neighbouring workers that may be suspected in one step: liars side by side back each other up.
LONGEST_RUN = 3
# The description's price for one suspect beside that of its answers: a believed worker's answers cost about 1 each.
PRICE = 4.0
# Variance forgiven to each of two workers at one node, and to any other, in units of the median variance with which the
# rest of the curve knows an answer. With less, a liar's honest twin is as likely to be taken for him; and ends of the
# curve, where workers are dense, would be held to more than they can keep where workers are noisy.
NOISE_OF_TWINS, NOISE = 0.4, 0.1
NEIGHBOURS = 5
# Of log(1 + z^2) where z is standard normal, and the median of z^2.
MEAN_LOG, MEDIAN_SQUARE = 0.533453179844, 0.454936423119


class _Setting(NamedTuple):
    """Everything known before the search: precision and outputs scaled to unit diagonal, and what is fixed."""

    precision: Array
    outputs: Array
    live: Array
    same_node: Array
    neighbours: Array
    floor: Array
    most: Array


class _Fit(NamedTuple):
    """The curve through the believed: its precision, residuals, energy; and the distances of the suspects."""

    believed: Array
    precision: Array
    residuals: Array
    number: Array
    energy: Array
    apart: Array
    spread: Array


@jax.jit
def find_outliers(
    worker_nodes: Float[Array, "workers"],
    data_nodes: Float[Array, "data"],
    outputs: Float[Array, "workers outputs"],
    live: Bool[Array, "workers"],
    rounding: Float[Array, ""] | float,
    most: Float[Array, ""] | float,
    least: Float[Array, ""] | float,
) -> tuple[Bool[Array, "workers"], Float[Array, "workers"]]:
    """Whom `robust.leave_one_out` suspects, and everyone's score.

    Args:
        worker_nodes: Ascending, float64.
        data_nodes: Strictly ascending, float64.
        outputs: Answers, float64; zero where not live.
        live: Who returned numbers.
        rounding: The relative precision of the answers as they came.
        most: The largest part of the live that may be suspected, two aside.
        least: The least score, in units of an honest worker's, that is suspicious.
    """
    setting = _prepare(worker_nodes, data_nodes, outputs, live, rounding, most)
    return _clear(setting, _search(setting), least)


def _prepare(worker_nodes, data_nodes, outputs, live, rounding, most):
    n = len(worker_nodes)
    index = jnp.arange(n)
    # Live sites, moved to the front; behind them the curve goes on without data.
    new = jnp.diff(worker_nodes, prepend=worker_nodes[0] - 1) > SAME_SITE * (worker_nodes[-1] - worker_nodes[0])
    site = jnp.cumsum(new)
    same_node = site[:, None] == site
    beside = same_node & live & live[:, None]
    first = live & ~jnp.any(beside & (index < index[:, None]), axis=1)
    sites = jnp.sum(first)
    slot = jnp.sum(first & (site <= site[:, None]), axis=1) - 1
    member = ((slot[:, None] == index) & live[:, None]).astype(jnp.float64)
    position = jnp.max(jnp.where(member > 0, worker_nodes[:, None], -jnp.inf), axis=0)
    position = jnp.where(index < sites, position, jnp.max(worker_nodes) + index + 1)
    contrasts, covariance = _second_differences(position, sites, data_nodes)
    per_site = contrasts @ _solve(covariance, contrasts.T)
    variance = 1 / jnp.where(jnp.diagonal(per_site) > 0, jnp.diagonal(per_site), 1)
    unit = _quantile(member @ variance, live, 0.5)

    # Lies beyond all bounds would leave no digits for others, and rounding is no lie.
    centre = _quantile(outputs.T, live, 0.5)
    width = jnp.maximum(_quantile(jnp.abs(outputs - centre).T, live, 0.8), 1e-6 * jnp.abs(centre))
    outputs = jnp.where(live[:, None], jnp.clip(outputs, centre - 1e4 * width, centre + 1e4 * width), 0)
    floor = (4 * rounding) ** 2 * (centre**2 + width**2) / unit + 1e-60

    # How far workers at one node differ, in the median; from the middle of three it takes two to tell.
    crowd = jnp.sum(beside, axis=1)
    mean = (member / jnp.maximum(jnp.sum(member, axis=0), 1)).T @ outputs
    size = _quantile((member @ ((per_site @ mean) ** 2 * variance[:, None])).T, live, 0.5) / MEDIAN_SQUARE + floor
    apart = (outputs - member @ mean) ** 2 * (crowd / jnp.maximum(crowd - 1, 1))[:, None]
    typical = _quantile(_pooled(apart / size) ** 2, crowd > 1, 0.5)
    noise = jnp.where(crowd > 2, jnp.clip(typical, 0.1 * NOISE * unit, NOISE_OF_TWINS * unit), NOISE_OF_TWINS * unit)
    weight = jnp.where(live, 1 / jnp.where(crowd > 1, noise, NOISE * unit), 0)
    total = weight @ member
    over = 1 / jnp.where(total > 0, total, 1)
    noisy = covariance + contrasts.T @ (over[:, None] * contrasts)
    of_sites = contrasts @ _solve(noisy, contrasts.T)
    share = weight[:, None] * member * over
    precision = jnp.diag(weight) - share @ (weight[:, None] * member).T + share @ of_sites @ share.T

    scale = jnp.sqrt(jnp.where(jnp.diagonal(precision) > 0, jnp.diagonal(precision), 1))
    count = jnp.sum(live)
    # For each worker those that returned nearest to it in order, itself among them.
    rank, in_order = jnp.cumsum(live) - 1, jnp.argsort(~live, stable=True)
    first = jnp.clip(rank - NEIGHBOURS, 0, jnp.maximum(count - 1 - 2 * NEIGHBOURS, 0))
    window = jnp.minimum(first[:, None] + jnp.arange(2 * NEIGHBOURS + 1), n - 1)
    neighbours = jnp.where((window < count) & (window != rank[:, None]), in_order[window], n)
    return _Setting(
        precision / (scale * scale[:, None]),
        outputs * scale[:, None],
        live,
        same_node,
        neighbours,
        floor,
        jnp.floor((count - 2) * most),
    )


def _second_differences(position, sites, data_nodes):
    """What of the values at neighbouring sites is no straight line, as columns, and its covariance under the process.

    Scaled so that the middle one of three counts 1; columns beyond the last site are zero, with unit variance.
    """
    n = len(position)
    gap = jnp.diff(position)
    # Inputs per unit of length, between neighbouring inputs, read at the middle of each gap.
    steps = jnp.diff(data_nodes)
    density = jnp.exp(
        jnp.interp((position[1:] + position[:-1]) / 2, (data_nodes[1:] + data_nodes[:-1]) / 2, -jnp.log(steps))
    )
    rough = density**3 * gap
    left, right = gap[:-1], gap[1:]
    both = left + right
    there = jnp.arange(n - 2) + 2 < sites
    j = jnp.arange(n - 2)
    below = jnp.arange(n)[:, None] - j
    contrasts = jnp.where(below == 0, right / both, 0) - (below == 1) + jnp.where(below == 2, left / both, 0)
    contrasts = jnp.where(there, contrasts, 0)
    scale = jnp.where(there, left * right / both, 0)
    diagonal = jnp.where(there, scale**2 * (rough[:-1] + rough[1:]) / 3, 1)
    beside = jnp.append(scale[:-1] * scale[1:] * rough[1:-1] / 6, 0)
    above = jnp.where(below[:-2] == -1, beside[:, None], 0)
    return contrasts, jnp.where(below[:-2] == 0, diagonal, above + above.T)


def _fit(setting, suspects):
    precision, outputs = setting.precision, setting.outputs
    believed = setting.live & ~suspects
    pair = suspects[:, None] & suspects
    inverse = _solve(jnp.where(pair, precision, jnp.eye(len(suspects))), jnp.eye(len(suspects)))
    to_suspects = jnp.where(suspects, precision, 0)
    left = precision - to_suspects @ inverse @ to_suspects.T
    left = jnp.where(believed[:, None] & believed, left, 0)
    residuals = left @ outputs
    count = jnp.sum(believed)
    energy = jnp.maximum(jnp.sum(outputs * residuals, axis=0), 0)
    apart = jnp.where(suspects[:, None], inverse @ jnp.where(suspects[:, None], precision @ outputs, 0), 0)
    return _Fit(believed, left, residuals, count, energy, apart, jnp.maximum(jnp.diagonal(inverse), 1e-60))


def _search(setting):
    n = len(setting.live)
    freedom = jnp.sum(setting.live) - 2
    runs = np.minimum(np.arange(n)[:, None] + np.arange(LONGEST_RUN), n - 1)
    runs = np.tile(runs, (LONGEST_RUN, 1))
    lengths = np.repeat(np.arange(1, LONGEST_RUN + 1), n)
    taken = np.arange(LONGEST_RUN) < lengths[:, None]
    starts = np.tile(np.arange(n), LONGEST_RUN)

    def step(carry):
        suspects, steps, _ = carry
        fit = _fit(setting, suspects)
        dof = jnp.maximum(fit.number - 2, 1)
        energy = fit.energy / dof + setting.floor

        def longer(new):
            return freedom * jnp.log(new / energy)

        # A run of neighbours among those believed is suspected.
        members = jnp.argsort(~fit.believed, stable=True)[runs]
        block = fit.precision[members[:, :, None], members[:, None, :]]
        inverse = _inverse_of_three(jnp.where(taken[:, :, None] & taken[:, None, :], block, jnp.eye(LONGEST_RUN)))
        beside = jnp.where(taken[:, :, None], fit.residuals[members], 0)
        apart = jnp.einsum("rij,rjc->ric", inverse, beside)
        remains = jnp.maximum(fit.energy - jnp.sum(beside * apart, axis=1), 0)
        less = remains / jnp.maximum(dof - lengths, 1)[:, None] + setting.floor
        spread = jnp.diagonal(inverse, axis1=1, axis2=2)[:, :, None] * less[:, None]
        price = jnp.log(jnp.prod(1 + apart**2 / spread, axis=1))
        change = jnp.mean(longer(less) + price, axis=1) + PRICE * lengths
        allowed = (starts + lengths <= fit.number) & (jnp.sum(suspects) + lengths <= setting.most)
        suspect = jnp.where(allowed & (change < 0), change, jnp.inf)
        # A suspect is cleared.
        more = (fit.energy + fit.apart**2 / fit.spread[:, None]) / (dof + 1) + setting.floor
        distance = jnp.log1p(fit.apart**2 / fit.spread[:, None] / energy)
        clear = jnp.where(suspects, jnp.mean(longer(more) - distance, axis=1) - PRICE, jnp.inf)

        best = _least(jnp.concatenate([suspect, clear]))
        is_run = best < len(starts)
        run = jnp.minimum(best, len(starts) - 1)
        # Beyond the run's length, out of bounds.
        added = suspects.at[jnp.where(jnp.asarray(taken)[run], members[run], n)].set(True, mode="drop")
        cleared = suspects.at[jnp.where(is_run, n, best - len(starts))].set(False, mode="drop")
        shorter = jnp.minimum(jnp.min(suspect), jnp.min(clear)) < -1e-9
        return jnp.where(shorter, jnp.where(is_run, added, cleared), suspects), steps + 1, shorter

    start = jnp.zeros(n, bool), jnp.zeros((), jnp.int32), jnp.sum(setting.live) > 2
    return jax.lax.while_loop(lambda carry: carry[2] & (carry[1] < n), step, start)[0]


def _clear(setting, suspects, least):
    n = len(setting.live)

    def scores(suspects):
        """How far each worker is out, in units of how far it may be."""
        fit = _fit(setting, suspects)
        # A trace of unity where without this node nothing would be known.
        block = jnp.where(setting.same_node, fit.precision, 0) + jnp.diag(jnp.where(fit.believed, 1e-9, 1.0))
        inverse = _solve(block, jnp.eye(n))
        # Leaving out all workers at a node; twins agree too well to tell how rough the curve is.
        without_node = (inverse @ fit.residuals) ** 2 / jnp.maximum(jnp.diagonal(inverse), 1e-60)[:, None]
        scale = _quantile(without_node.T, fit.believed, 0.5) / MEDIAN_SQUARE + setting.floor
        own = jnp.diagonal(fit.precision)
        own = jnp.where(own > 0, own, 1)
        alone = _pooled(fit.residuals**2 / own[:, None] / scale)
        outside = _pooled(fit.apart**2 / fit.spread[:, None] / scale)
        far = jnp.where(fit.believed, alone, jnp.where(suspects, outside, 0))
        typical = jnp.where(fit.believed, _pooled(without_node / scale), far)
        around = _quantile(jnp.append(typical, 0)[setting.neighbours], setting.neighbours < n, 0.5)
        unit = jnp.maximum(jnp.maximum(_quantile(typical, fit.believed, 0.5), 1), around)
        middle, upper = _quantiles(typical / unit, fit.believed, (0.5, 0.7))
        return far / (unit * jnp.maximum(middle + 4.5 * (upper - middle) / 0.524, least))

    def step(carry):
        suspects, _, _ = carry
        score = scores(suspects)
        mild = suspects & (score < 1)
        mildest = _least(jnp.where(mild, score, jnp.inf))
        return suspects & ~(mild & (jnp.arange(n) == mildest)), score, jnp.any(mild)

    start = suspects, jnp.zeros(n), jnp.bool_(True)
    return jax.lax.while_loop(lambda carry: carry[2], step, start)[:2]


def _solve(matrix, right):
    """For symmetric positive definite matrices."""
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix, lower=True), right)


def _inverse_of_three(matrices):
    """Of symmetric 3 x 3 matrices, shape (..., 3, 3); compiled faster than a factorization."""
    a, b, c = (matrices[..., i, :] for i in range(3))
    crossed = jnp.stack([jnp.cross(b, c), jnp.cross(c, a), jnp.cross(a, b)], axis=-2)
    return crossed / jnp.sum(a * crossed[..., 0, :], axis=-1)[..., None, None]


def _least(values):
    """Where the least is."""
    # In float32: with x64 off the reduction of wider numbers is lowered for narrow ones.
    return jax.lax.argmin(values.astype(jnp.float32), 0, jnp.int32)


def _pooled(squares):
    """One number per worker from squared standardised residuals, in the mean 1 for standard normal ones."""
    return jnp.sqrt(jnp.expm1(jnp.mean(jnp.log1p(squares), axis=1)) / np.expm1(MEAN_LOG))


def _quantile(values, among, q):
    return _quantiles(values, among, (q,))[0]


def _quantiles(values, among, qs):
    """Over the last axis, of those among; 0 of none."""
    among = jnp.broadcast_to(among, values.shape)
    ordered = jnp.sort(jnp.where(among, values, jnp.inf), axis=-1)
    last = jnp.maximum(jnp.sum(among, axis=-1) - 1, 0)
    quantiles = []
    for q in qs:
        below = jnp.floor(q * last).astype(jnp.int32)
        part = q * last - below
        above = jnp.where(part > 0, below + 1, below)
        low, high = (jnp.take_along_axis(ordered, i[..., None], axis=-1)[..., 0] for i in (below, above))
        quantiles.append(jnp.where(jnp.any(among, axis=-1), low + part * (high - low), 0))
    return quantiles
