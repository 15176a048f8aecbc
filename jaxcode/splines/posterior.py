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
LEAST = np.array([3, 2, 6])
DOUBT = 20
PRIOR = 4
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
    sites, processes = _prepare(knots, points, weights, smoothing)
    return _judge(sites, processes, values, points, weights, smoothing, rounding).astype(values.dtype)


@in_float64
@jax.jit
def _prepare(knots, points, weights, smoothing):
    sites = find_sites(knots, weights)
    orders = np.array(ORDERS)
    smoothing = jnp.where(orders == 2, smoothing, 0)
    return sites, integrated_processes(sites, points, ORDERS, _noise(sites, points), smoothing)


@in_float64
@jax.jit
def _judge(sites, processes, values, points, weights, smoothing, rounding):
    """Axes of arrays in order: h hypotheses, e powers, k places (first the points, then sites left out), n sites, d."""
    data = sites.average @ jnp.where(weights[:, None] > 0, values, 0)
    # Relative to their size, so that squares neither vanish nor overflow.
    size = jnp.max(jnp.abs(data), axis=0)
    size = jnp.where(size > 0, size, 1)
    data, p, orders = data / size, len(points), np.array(ORDERS)

    means = processes.rows @ data
    there = (sites.rank < sites.live) & (sites.live > orders[:, None])
    square = jnp.where(there[..., None], data - means[:, p:], 0) ** 2
    number = jnp.maximum(jnp.sum(there, axis=1), 1)[:, None]
    free = processes.variance > 0
    log_variance = jnp.log(jnp.where(free, processes.variance, 1))
    log_variance = log_variance - jnp.sum(jnp.where(there, log_variance[:, p:], 0), axis=1, keepdims=True) / number
    powers = np.linspace(1, 4 * orders / (2 * orders - 1), POWERS, axis=1)[:, None]
    spread = jnp.exp(powers * jnp.where(free, log_variance, -jnp.inf)[..., None])
    held = jnp.where(there[..., None], spread[:, p:], 1)

    # What rounding the data alone leaves. Features that are straight lines have no say in what is likely.
    scale = jnp.einsum("hne,hnd->hed", 1 / held, square) / number[..., None]
    floor = rounding**2
    share = scale[0, 0] / (scale[0, 0] + floor) + floor
    share = share / jnp.sum(share)
    surprise = jnp.einsum("hnd,hed->hne", square, share / (scale + floor)) / held
    weight, squares = _neighbours(sites, points)
    squares = squares / jnp.sum(share**2)
    local = (squares * (weight @ surprise) + PRIOR) / (squares + PRIOR)

    fit = jnp.where(there[..., None], jnp.log(held * local[:, p:]) + surprise / local[:, p:], 0)
    evidence = -0.5 * (jnp.sum(fit, axis=1) + number * (jnp.log(scale + floor) @ share))
    enough = (sites.live >= LEAST) & ((orders != 2) | (smoothing > 0))
    likely = jax.nn.softmax(jnp.where(enough[:, None], evidence, -1e30), axis=(0, 1))
    variance = jnp.einsum("hke,hed->kd", likely[:, None] * spread * local, scale)
    bias = jnp.einsum("he,hkd->kd", likely, (means - means[0]) ** 2)

    wider = _student(1 / jnp.maximum(sites.live - 2, 1) + 1 / (squares + PRIOR))
    error = _half_width(variance[:p] * wider, bias[:p]) / WITHIN
    ratio = _correction(sites, data - means[0, p:], _half_width(variance[p:], bias[p:]))
    error = size * error * ratio
    # Two places say nothing about how a curve bends.
    error = jnp.where(sites.live >= 3, error, jnp.where(free[0, :p, None], jnp.inf, 0))
    return jnp.where(sites.live >= 2, error, jnp.inf)


def _neighbours(sites, points):
    """Weights of the two or three sites nearest to each place, sites left out first of all; and how many they are."""
    live = sites.rank < sites.live
    passed = jnp.clip((points[:, None] - sites.place[:-1]) / (sites.place[1:] - sites.place[:-1]), 0, 1)
    here = jnp.concatenate([passed @ live[1:], sites.rank])[:, None]
    others = np.arange(len(here))[:, None] - len(points) != sites.rank
    weight = jnp.exp(-((here - sites.rank) ** 2)) * (live & others)
    weight = weight / jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1e-30)
    return weight, sites.live / jnp.maximum(jnp.sum((weight[len(points) :] ** 2).T * live), 1e-30)


def _correction(sites, residual, predicted):
    """By how much nine tenths of the residuals are larger than predicted, or smaller."""
    known = predicted > 0
    ratio = jnp.where(known, jnp.abs(residual) / jnp.where(known, predicted, 1), 1)
    ordered = jnp.sort(jnp.where((sites.rank < sites.live)[:, None], ratio, jnp.inf), axis=0)
    at = jnp.maximum(jnp.ceil(0.9 * sites.live) - 1, 0).astype(jnp.int32)
    ratio = jnp.where(sites.live > 0, ordered[at], 1)
    return (sites.live * ratio + DOUBT) / (sites.live + DOUBT)


def _half_width(variance, bias):
    """Within what an error of this mean squared and this variance stays nine times of ten, to three per cent."""
    spread, both = _root(variance), _root(bias + (WITHIN - BELOW) ** 2 * variance)
    return BELOW * spread + both


def _root(square):
    """With derivative zero at zero."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _noise(sites, points):
    """Even for each order but the fourth, nine tenths of whose noise stand at the points."""
    even = even_noise(sites, points)
    ordered = jnp.sort(points)
    first, last = 2 * ordered[:1] - ordered[1:2], 2 * ordered[-1:] - ordered[-2:-1]
    padded = jnp.concatenate([first, ordered, last])
    share = np.where(np.array(ORDERS) == 4, BENT, 0)[:, None]
    measure = jnp.concatenate([(1 - share) * even.measure, share * (padded[2:] - padded[:-2]) / 2], axis=1)
    return Noise(jnp.concatenate([even.at, ordered]), measure)


def _student(over_freedom):
    """The square of how much wider than the normal distribution Student's t is, by 1 / (degrees of freedom)."""
    over_freedom = jnp.minimum(over_freedom, 1)
    return jnp.exp(over_freedom * (1.853 + 0.86 * over_freedom))
