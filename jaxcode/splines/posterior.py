r"""How far a smoothing spline may be from the truth, judged by the data themselves before any truth is known.

The smoothing spline is the posterior mean of an integrated Wiener process, which comes with a variance (Wahba 1978).
Taken at its word it is far too wide for smooth functions, whose interpolation error falls faster with the distance
between knots than the process says, and blind to where the curve bends. Here it is one hypothesis of several, and the
data say how far to trust each:

* the function is a Wiener process integrated m - 1 times, m = 1 to 4, seen at the knots without noise, or (m = 2) with
  the noise that a smoothing above zero stands for. The cubic spline's error at a point then has a mean, the difference
  of two linear estimates, and a variance :math:`b \, v^p c`, with v the posterior variance of a process of unit scale;
* squared errors grow with v to the power p, from p = 1, the process's own, to :math:`4m / (2m - 1)`: on functions that
  are smooth on the scale of the knots, splines of degree 2m - 1 err by the 2m-th power of the distance;
* c says how much more than elsewhere the curve bends here, which nearby knots tell as far as not by chance.

Evidence is how well a hypothesis predicts what it has not seen: every knot's value from all others, and from all but a
neighbour. The same residuals give the scale b of each feature, which fits what cross-validation finds and not what the
process says about itself. What hypotheses are likely is judged from all features together.

`wiener` has the processes.

References:
    Wahba, Journal of the Royal Statistical Society B 40 (1978). Geisser and Eddy, Journal of the American Statistical
    Association 74 (1979), for predictive likelihood. Karvonen et al., SIAM/ASA Journal on Uncertainty Quantification 8
    (2020), for how Gaussian processes misjudge functions smoother than they are.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Inexact

from .._float64 import in_float64
from .wiener import Noise, even_noise, find_sites, integrated_processes

ORDERS = (2, 1, 4)
BENT = 0.9
PRIOR = 20
# Powers of v that are tried, from the process's own to the highest.
POWERS = 4
# Nine tenths of a standard normal variable lie within the first, and below the second.
WITHIN, BELOW = 1.6448536269514722, 1.2815515655446004


def predicted_errors(
    knots: ArrayLike,
    values: Inexact[Array, "knots features"],
    points: ArrayLike,
    weights: ArrayLike,
    smoothing: ArrayLike = 0.0,
) -> Inexact[Array, "points features"]:
    r"""Standard errors of the smoothing spline through the data, read at the points.

    They are such that the spline's value :math:`\pm 1.645` of them holds the truth nine times of ten. Where the spline
    is thought to err by a known amount rather than either way, that is less than the expected square of its error.

    Args:
        knots: Shape (n,), ascending; neighbours may be equal, and count as one whose value is their weighted mean.
        values: Data, shape (n, d), real.
        points: Shape (p,), in any order.
        weights: Shape (n,), not negative; values of weight zero are not read.
        smoothing: :math:`\mu \ge 0`, of the spline.

    Returns:
        Shape (p, d), in the data's unit and dtype, not negative. Zero at knots that are interpolated and for data on a
        straight line; infinite elsewhere with data at two places only, and everywhere with fewer than two data. From
        few places they are as wide as Student's t for as many. Computed in float64, in O(n^3 + n p) time, and products
        of n-sized matrices with the data.

    References:
        Those of the module.
    """
    rounding = float(jnp.finfo(values.dtype).eps)
    return _predicted_errors(knots, values, points, weights, smoothing, rounding).astype(values.dtype)


class _Hypothesis(NamedTuple):
    """What a hypothesis says with each of its powers; first of the points, then of each site when it is left out.

    Attributes:
        evidence: Log predictive likelihood, shape (powers,).
        scale: b, shape (powers, features).
        spread: :math:`v^p c`, shape (points + sites, powers).
    """

    evidence: Float[Array, "powers"]
    scale: Float[Array, "powers features"]
    spread: Float[Array, "places powers"]


@in_float64
@jax.jit
def _predicted_errors(knots, values, points, weights, smoothing, rounding):
    sites = find_sites(knots, weights)
    data = sites.average @ jnp.where(weights[:, None] > 0, values, 0)
    # Relative to their size, so that squares neither vanish nor overflow.
    size = jnp.max(jnp.abs(data), axis=0)
    size = jnp.where(size > 0, size, 1)
    data = data / size

    orders = np.array(ORDERS)
    noise = _noise(sites, points)
    processes = integrated_processes(sites, points, ORDERS, noise, jnp.where(orders == 2, smoothing, 0))
    rows = jax.vmap(_everywhere)(processes)
    means = rows @ data
    found = jax.vmap(functools.partial(_weigh, sites, data, points, rounding))(orders, processes, means)
    evidence = jnp.where(((orders != 2) | (smoothing > 0) | ALWAYS2)[:, None], found.evidence, -jnp.inf)
    likely = jax.nn.softmax(evidence, axis=(0, 1))
    variance = jnp.einsum("hp,hkp,hpd->kd", likely, found.spread, found.scale)
    bias = jnp.einsum("hp,hkd->kd", likely, (means - means[0]) ** 2)

    error = _half_width(variance, bias) / WITHIN
    error, held = error[: len(points)], error[len(points) :]
    error = size * error * _correction(sites, data - means[0, len(points) :], held)
    # Two places say nothing about how a curve bends.
    certain = processes.variance[0, :, None] <= 0
    error = jnp.where(sites.live >= 3, error, jnp.where(certain, 0, jnp.inf))
    return jnp.where(jnp.sum(weights > 0) >= 2, error, jnp.inf)


ALWAYS2 = False

def _noise(sites, points):
    """Even for each order but the fourth, nine tenths of whose noise stand at the points."""
    even = even_noise(sites, points)
    ordered = jnp.sort(points)
    first, last = 2 * ordered[:1] - ordered[1:2], 2 * ordered[-1:] - ordered[-2:-1]
    padded = jnp.concatenate([first, ordered, last])
    share = np.where(np.array(ORDERS) == 4, BENT, 0)[:, None]
    measure = jnp.concatenate([(1 - share) * even.measure, share * (padded[2:] - padded[:-2]) / 2], axis=1)
    return Noise(jnp.concatenate([even.at, ordered]), measure)


def _correction(sites, residual, predicted):
    """By how much nine tenths of the residuals are larger than predicted."""
    there = (sites.rank < sites.live)[:, None]
    known = there & (predicted > 0)
    ratio = jnp.where(known, jnp.abs(residual) / jnp.where(known, predicted, 1) / WITHIN, 1)
    ordered = jnp.sort(jnp.where(there, ratio, jnp.inf), axis=0)
    at = jnp.maximum(-(-9 * sites.live // 10) - 1, 0)
    return (sites.live * jnp.where(sites.live > 0, ordered[at], 0) + PRIOR) / (sites.live + PRIOR)


def _everywhere(process):
    """From data to means at the points, and at each site when it is left out."""
    own = jnp.diagonal(process.precision)
    return jnp.concatenate([process.rows, jnp.eye(len(own)) - process.precision / jnp.where(own > 0, own, 1)[:, None]])


def _half_width(variance, bias):
    """Within what an error of this mean squared and this variance stays nine times of ten, to three per cent."""
    spread, both = _root(variance), _root(bias + (WITHIN - BELOW) ** 2 * variance)
    return BELOW * spread + both


def _root(square):
    """With derivative zero at zero."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _weigh(sites, data, points, rounding, m, process, means):
    own = jnp.diagonal(process.precision)
    there = (sites.rank < sites.live) & (sites.live > m) & (own > 0)
    number = jnp.maximum(jnp.sum(there), 1)
    square = jnp.where(there[:, None], data - means[len(points) :], 0) ** 2
    held_out = 1 / jnp.where(there, own, 1)
    unit = jnp.exp(jnp.sum(jnp.where(there, jnp.log(held_out), 0)) / number)
    power = jnp.linspace(1, 4 * m / (2 * m - 1), POWERS)
    variance = jnp.concatenate([process.variance, held_out])[:, None]
    spread = jnp.where(variance > 0, jnp.where(variance > 0, variance, 1) / unit, 0) ** power
    held = jnp.where(there[:, None], spread[len(points) :], 1)

    scale = (there[:, None] / held).T @ square / number
    # What rounding the data alone leaves. Features that are straight lines have no say in what is likely.
    floor = rounding**2
    share = scale[0] / (scale[0] + floor) + floor
    share = share / jnp.sum(share)
    chance = jnp.asarray(_trigamma(_freedom(sites) / 2))[sites.live]
    log_scale, _ = _shrunk(jnp.log(scale + floor), share, chance)
    scale = scale / (scale + floor) * jnp.exp(log_scale)
    surprise = square @ (share * jnp.exp(-log_scale)).T / held

    local, doubt = _local(sites, points, surprise, share)
    fit = jnp.log(held * local[len(points) :]) + log_scale @ share + surprise / local[len(points) :]
    evidence = -0.5 * jnp.sum(jnp.where(there[:, None], fit, 0), axis=0)
    enough = sites.live >= jnp.where(m <= 2, m + 1, m + 2)
    wider = _student(jnp.minimum(1 / jnp.asarray(_freedom(sites))[sites.live] + doubt, 1))
    spread = spread * local * jnp.where(np.arange(len(local))[:, None] < len(points), wider, 1)
    return _Hypothesis(
        jnp.where(enough, evidence, -jnp.inf),
        jnp.where(enough, scale, 0),
        jnp.where(enough, spread, 0),
    )


def _freedom(sites):
    """Degrees of freedom that so many sites, from none to all, leave to a scale."""
    return np.maximum(np.arange(sites.place.shape[0] + 1) - 2.0, 1)


def _shrunk(logs, share, chance):
    """Logarithms moved to their mean, as far as chance explains their spread; and how far they kept from it."""
    mean = (logs @ share)[..., None]
    spread = ((logs - mean) ** 2 @ share)[..., None]
    kept = jnp.maximum(spread - chance, 0) / jnp.maximum(spread, chance)
    return mean + jnp.where(logs.shape[-1] > 1, kept, 1) * (logs - mean), kept


def _local(sites, points, surprise, share):
    """How much larger squared errors are here than everywhere: c.

    Of the two or three sites nearest to here the mean surprise, its logarithm shrunk by what chance explains.

    Returns:
        At the points, and at the sites as others tell, shape (points + sites, powers); and what 1 / (degrees of
        freedom) their uncertainty adds, shape (powers,).
    """
    live = sites.rank < sites.live
    gap = jnp.diff(sites.place)
    passed = jnp.clip((points[:, None] - sites.place[:-1]) / gap, 0, 1)
    where = jnp.sum(passed, axis=1, where=live[1:])
    here = jnp.concatenate([where, sites.rank])
    own = jnp.concatenate([jnp.zeros((len(points), len(live)), bool), jnp.eye(len(live), dtype=bool)])
    weight = jnp.exp(-((here[:, None] - sites.rank) ** 2)) * (live & ~own)
    weight = weight / jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1e-30)
    logs = jnp.log(weight @ surprise + 1e-12)
    # As many independent squares as sites in a neighbourhood times features that have a say.
    squares = jnp.maximum(sites.live, 1) / jnp.maximum(jnp.sum(weight[len(points) :] ** 2, where=live[:, None]), 1e-30)
    chance = _trigamma(0.5 * squares / jnp.sum(share**2))
    _, kept = _shrunk(logs[len(points) :].T, live / jnp.maximum(sites.live, 1), chance)
    kept = kept[:, 0]
    # Of what degrees of freedom the logarithm of a mean square has this variance.
    return jnp.exp(kept * logs), (jnp.sqrt(1 + 2 * kept * chance) - 1) / 2


def _trigamma(x):
    """The variance of the logarithm of a chi-squared variable of 2x degrees of freedom, to 1e-5; compiles fast."""
    z = x + 3
    series = 1 / z + 1 / (2 * z**2) + 1 / (6 * z**3) - 1 / (30 * z**5)
    return series + 1 / x**2 + 1 / (x + 1) ** 2 + 1 / (x + 2) ** 2


def _student(over_freedom):
    """The square of how much wider than the normal distribution Student's t is, by 1 / (degrees of freedom)."""
    return jnp.exp(over_freedom * (1.853 + 0.86 * over_freedom))
