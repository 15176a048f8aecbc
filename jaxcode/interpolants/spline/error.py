r"""How far a smoothing spline may be from the truth, judged by the data themselves before any truth is known.

The smoothing spline is the posterior mean of an integrated Wiener process, which comes with a variance (Wahba 1978).
Taken at its word it is far too wide for smooth functions, whose interpolation error falls faster with the distance
between knots than the process says, and blind to where the curve bends. Here the data say what to believe:

* the function is white noise integrated m times, seen at the knots without noise: once, which is rough, or four times,
  which is smooth, the noise even or most of it at the points. There a curve that a cubic spline drew through them, as
  an encoder does, has jumps in its third derivative, and what is made of it too. Above a smoothing of zero it may also
  be the spline's own process, m = 2, with the noise that the smoothing stands for. The spline's error at a place then
  has a mean, the difference of two linear estimates, and a variance :math:`b \, v^p c`, with v the posterior variance
  of a process of unit scale;
* squared errors grow with v to the power p, from p = 1, the process's own, to :math:`4m / (2m - 1)`: on functions that
  are smooth on the scale of the knots, splines of degree 2m - 1 err by the 2m-th power of the distance;
* c says how much more than elsewhere the curve bends here, which nearby knots tell as far as they are many.

Evidence is how well a hypothesis foretells every knot's value from all others, in all features together. The same
residuals give the scale b of each feature, and at last tell whether the errors predicted for them held nine of ten: if
not, all are widened or narrowed.

`wiener` has the processes.

References:
    Wahba, Journal of the Royal Statistical Society B 40 (1978). Geisser and Eddy, Journal of the American Statistical
    Association 74 (1979), for predictive likelihood. Karvonen et al., SIAM/ASA Journal on Uncertainty Quantification 8
    (2020), for how Gaussian processes misjudge functions smoother than they are. Barber et al., Annals of Statistics 49
    (2021), for intervals from the quantiles of residuals left out.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Inexact

from ..._float64 import in_float64
from .wiener import find_sites, integrated_processes

# Of each process: m, the spline's own first; what share of its noise stands at the points; how many sites it needs.
ORDERS, BENT, LEAST = np.array([2, 1, 4, 4]), np.array([0, 0, 0, 0.9]), np.array([3, 2, 6, 6])
# Powers of v that are tried, from the process's own to the highest.
POWERS = 4
# How many squares nearby, or ratios of residuals to predictions, weigh as much as the belief that all is as usual.
USUAL_SQUARES, USUAL_RATIOS = 1, 20
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
        points: Shape (p,), in any order. The truth may have jumps in its third derivative there.
        weights: Shape (n,), not negative; values of weight zero are not read.
        smoothing: :math:`\mu \ge 0`, of the spline.

    Returns:
        Shape (p, d), in the data's unit and dtype, not negative. Zero at knots that are interpolated and for data on a
        straight line; infinite elsewhere with data at two places only, and everywhere with fewer than two data. From
        few places they are as wide as Student's t for as many. Computed in float64, in O((n + p)^3) time and
        products of n-sized matrices with the data.

    References:
        Those of the module.
    """
    rounding = float(jnp.finfo(values.dtype).eps)
    known = _prepare(knots, points, weights, smoothing)
    # Apart from the above, whose program is large, so that derivatives with respect to values compile without it.
    return _judge(*known, values, points, weights, smoothing, rounding).astype(values.dtype)


@in_float64
@jax.jit
def _prepare(knots, points, weights, smoothing):
    sites = find_sites(knots, weights)
    return sites, integrated_processes(sites, points, ORDERS, BENT, jnp.where(ORDERS == 2, smoothing, 0))


@in_float64
@jax.jit
def _judge(sites, processes, values, points, weights, smoothing, rounding):
    """Arrays have axes h, hypotheses; e, powers; k, places: the points, then sites left out; n, sites; d, features."""
    data = sites.average @ jnp.where(weights[:, None] > 0, values, 0)
    # Relative to their size, so that squares neither vanish nor overflow.
    size = jnp.max(jnp.abs(data), axis=0)
    size = jnp.where(size > 0, size, 1)
    data, p = data / size, len(points)

    means = processes.rows @ data
    residual = data - means[:, p:]
    enough = sites.live > ORDERS[:, None]
    there, number = sites.present & enough, jnp.where(enough, sites.live, 1)
    free = processes.variance > 0
    log_variance = jnp.log(jnp.where(free, processes.variance, 1))
    log_unit = (log_variance[:, p:] @ sites.present)[:, None] / number
    power = np.linspace(1, 4 * ORDERS / (2 * ORDERS - 1), POWERS, axis=1)[:, None]
    spread = jnp.exp(power * jnp.where(free, log_variance - log_unit, -jnp.inf)[..., None])
    held = jnp.where(there[..., None], spread[:, p:], 1)

    square = jnp.where(there[..., None], residual, 0) ** 2
    scale = jnp.einsum("hne,hnd->hed", 1 / held, square) / number[..., None]
    # What rounding the data alone leaves. Features that are straight lines have no say in what is likely.
    floor = rounding**2
    say = scale[0, 0] / (scale[0, 0] + floor) + floor
    say = say / jnp.sum(say)
    surprise = jnp.einsum("hnd,hed->hne", square, say / (scale + floor)) / held

    near, squares = _neighbours(sites, points)
    squares = squares / jnp.sum(say**2)
    local = jnp.exp(squares / (squares + USUAL_SQUARES) * jnp.log(near @ surprise + 1e-12))
    fit = sites.present @ (jnp.log(held * local[:, p:]) + surprise / local[:, p:])
    evidence = -0.5 * (fit + number * (jnp.log(scale + floor) @ say))
    possible = (sites.live >= LEAST) & ((ORDERS != 2) | (smoothing > 0))
    likely = jax.nn.softmax(jnp.where(possible[:, None], evidence, -1e30), axis=(0, 1))

    variance = jnp.einsum("hke,hed->kd", likely[:, None] * spread * local, scale)
    bias = jnp.einsum("he,hkd->kd", likely, (means - means[0]) ** 2)
    wider = _student(1 / jnp.maximum(sites.live - 2, 1) + 1 / (squares + USUAL_SQUARES))
    error = _half_width(variance[:p] * wider, bias[:p]) / WITHIN
    error = size * error * _correction(sites, residual[0], _half_width(variance[p:], bias[p:]))
    # Two places say nothing about how a curve bends.
    error = jnp.where(sites.live >= 3, error, jnp.where(free[0, :p, None], jnp.inf, 0))
    return jnp.where((weights > 0) @ np.ones(len(weights)) >= 2, error, jnp.inf)


def _neighbours(sites, points):
    """Weights, at each place, of the two or three sites nearest to it, itself left out; and how many those are."""
    rank, n = np.arange(len(sites.place)), len(sites.place)
    passed = jnp.clip((points[:, None] - sites.place[:-1]) / (sites.place[1:] - sites.place[:-1]), 0, 1)
    here = jnp.concatenate([passed @ sites.present[1:], rank])
    others = np.concatenate([np.ones((len(points), n), bool), ~np.eye(n, dtype=bool)])
    weight = jnp.exp(-((here[:, None] - rank) ** 2)) * (sites.present & others)
    weight = weight / jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1e-30)
    sharpness = jnp.sum(sites.present @ weight[len(points) :] ** 2)
    return weight, sites.live / jnp.maximum(sharpness, 1e-30)


def _half_width(variance, bias):
    """Within what an error of this mean squared and this variance stays nine times of ten, to three per cent."""
    return BELOW * _root(variance) + _root(bias + (WITHIN - BELOW) ** 2 * variance)


def _root(square):
    """With derivative zero at zero."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _student(over_freedom):
    """The square of how much wider than normal Student's t is, by 1 / (degrees of freedom) up to 1, to 3 per cent."""
    over_freedom = jnp.minimum(over_freedom, 1)
    return jnp.exp(over_freedom * (1.853 + 0.86 * over_freedom))


def _correction(sites, residual, half_width):
    """What nine of ten residuals are within, in half widths."""
    known = half_width > 0
    ratio = jnp.where(known, jnp.abs(residual) / jnp.where(known, half_width, 1), 1)
    ratio = jnp.sort(jnp.where(sites.present[:, None], ratio, jnp.inf), axis=0)
    ratio = ratio[jnp.maximum(jnp.ceil(0.9 * sites.live) - 1, 0).astype(jnp.int32)]
    seen = sites.live / (sites.live + USUAL_RATIOS)
    return jnp.where(seen > 0, seen * jnp.where(seen > 0, ratio, 1) + 1 - seen, 1)
