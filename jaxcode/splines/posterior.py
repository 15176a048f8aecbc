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
from scipy.special import stdtrit

from .._checks import is_concrete
from .._float64 import in_float64
from .wiener import find_sites, integrated_process

# Of integrated processes: m.
ORDERS = (1, 2, 3, 4)
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
    noisy = not (is_concrete(smoothing) and float(np.asarray(smoothing)) == 0)
    rounding = float(jnp.finfo(values.dtype).eps)
    return _predicted_errors(noisy)(knots, values, points, weights, smoothing, rounding).astype(values.dtype)


class _Hypothesis(NamedTuple):
    """What a hypothesis says with each of its powers.

    Attributes:
        evidence: Log predictive likelihood, shape (powers,).
        scale: b, shape (powers, features).
        spread: :math:`v^p c` at the points, widened for what is not known of b and c, shape (points, powers).
        shift: Its mean at the points less the spline's, shape (points, features).
    """

    evidence: Float[Array, "powers"]
    scale: Float[Array, "powers features"]
    spread: Float[Array, "points powers"]
    shift: Float[Array, "points features"]


@functools.cache
def _predicted_errors(noisy):
    return in_float64(jax.jit(functools.partial(_errors, noisy)))


def _errors(noisy, knots, values, points, weights, smoothing, rounding):
    sites = find_sites(knots, weights)
    data = sites.average @ jnp.where(weights[:, None] > 0, values, 0)
    # Relative to their size, so that squares neither vanish nor overflow.
    size = jnp.max(jnp.abs(data), axis=0)
    size = jnp.where(size > 0, size, 1)
    data = data / size

    processes = [(m, integrated_process(sites, points, m)) for m in ORDERS]
    spline = dict(processes)[2]
    if noisy:
        spline = integrated_process(sites, points, 2, smoothing)
        processes.append((2, spline))
    found = [_weigh(sites, data, points, m, process, spline.rows, rounding) for m, process in processes]
    likely = jax.nn.softmax(jnp.concatenate([hypothesis.evidence for hypothesis in found]))
    scale = jnp.concatenate([hypothesis.scale for hypothesis in found])
    spread = jnp.concatenate([hypothesis.spread for hypothesis in found], axis=1)
    variance = (spread * likely) @ scale
    bias = sum(
        jnp.sum(likely[i * POWERS : (i + 1) * POWERS]) * hypothesis.shift**2 for i, hypothesis in enumerate(found)
    )

    error = size * _half_width(variance, bias) / WITHIN
    # Two places say nothing about how a curve bends.
    certain = spline.variance[:, None] <= 0
    error = jnp.where(sites.live >= 3, error, jnp.where(certain, 0, jnp.inf))
    return jnp.where(jnp.sum(weights > 0) >= 2, error, jnp.inf)


def _half_width(variance, bias):
    """Within what an error of this mean squared and this variance stays nine times of ten, to three per cent."""
    spread, both = _root(variance), _root(bias + (WITHIN - BELOW) ** 2 * variance)
    return BELOW * spread + both


def _root(square):
    """With derivative zero at zero."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _held_out(sites, precision, m):
    """Residuals of sites left out alone, and of sites left out with a neighbour.

    Returns:
        From data to residuals, shape (2, sites, sites); their variances for unit scale, 1 where there is no residual;
        and where there is one.
    """
    own = jnp.diagonal(precision)
    partner = jnp.where(sites.rank + 1 < sites.live, sites.rank + 1, jnp.maximum(sites.rank - 1, 0))
    shared, theirs = precision[sites.rank, partner], own[partner]
    rest = own - shared**2 / jnp.where(theirs > 0, theirs, 1)
    among = sites.rank < sites.live
    alone = among & (sites.live > m) & (own > 0)
    # Of as many sites as contrasts, or fewer, nothing is left to be predicted from.
    paired = among & (sites.live > m + 1) & (rest > 1e-12 * own)
    share = jnp.where(paired, shared / jnp.where(theirs > 0, theirs, 1), 0)
    there = jnp.stack([alone, paired])
    variance = 1 / jnp.where(there, jnp.stack([own, rest]), 1)
    rows = jnp.stack([precision, precision - share[:, None] * precision[partner]])
    return jnp.where(there[..., None], variance[..., None] * rows, 0), variance, there


def _weigh(sites, data, points, m, process, spline_rows, rounding):
    residual, variance, there = _held_out(sites, process.precision, m)
    number = jnp.maximum(jnp.sum(there), 1)
    square = (residual @ data) ** 2
    unit = jnp.exp(jnp.sum(jnp.where(there, jnp.log(variance), 0)) / number)
    power = np.linspace(1, 4 * m / (2 * m - 1), POWERS)
    held = jnp.where(there, variance / unit, 1) ** power[:, None, None]
    free = process.variance > 0
    at_points = jnp.where(free, jnp.where(free, process.variance, 1) / unit, 0)[:, None] ** power * free[:, None]

    scale = jnp.tensordot(there / held, square, axes=2) / number
    # What rounding the data alone leaves. Features that are straight lines have no say in what is likely.
    floor = rounding**2
    share = scale[0] / (scale[0] + floor) + floor
    share = share / jnp.sum(share)
    chance = jnp.asarray(_trigamma(_freedom(sites) / 2))[sites.live]
    log_scale, _ = _shrunk(jnp.log(scale + floor), share, chance)
    scale = scale / (scale + floor) * jnp.exp(log_scale)
    surprise = jnp.moveaxis(square @ (share * jnp.exp(-log_scale)).T, -1, 0) / held

    at_site, at_point, doubt = _local(sites, points, jnp.where(there, surprise, 0), there, share)
    fit = jnp.log(held * at_site[:, None, :]) + (log_scale @ share)[:, None, None] + surprise / at_site[:, None, :]
    # Leaving out twice tells more about the power, not twice as much about everything.
    evidence = -0.5 * jnp.sum(jnp.where(there, fit, 0), axis=(1, 2)) * sites.live / number
    enough = sites.live >= (m + 1 if m <= 2 else m + 2)
    spread = at_points * at_point.T * _student(1 / jnp.asarray(_freedom(sites))[sites.live] + doubt)
    return _Hypothesis(
        jnp.where(enough, evidence, -jnp.inf),
        jnp.where(enough, scale, 0),
        jnp.where(enough, spread, 0),
        jnp.where(enough, (process.rows - spline_rows) @ data, 0),
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


def _local(sites, points, surprise, there, share):
    """How much larger squared errors are here than everywhere: c.

    Of the two or three sites nearest to here the mean surprise, its logarithm shrunk by what chance explains.

    Returns:
        At the sites, as others tell, shape (powers, sites); at the points; and what 1 / (degrees of freedom) their
        uncertainty adds, shape (powers,).
    """
    mean = jnp.sum(surprise, axis=1) / jnp.maximum(jnp.sum(there, axis=0), 1)
    live = sites.rank < sites.live
    where = jnp.minimum(jnp.interp(points, sites.place, sites.rank.astype(points.dtype)), sites.live - 1)

    def near(here):
        return jnp.exp(-((here[:, None] - sites.rank) ** 2.0)) * live

    def averaged(weight):
        weight = weight / jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1e-30)
        return jnp.log(mean @ weight.T + 1e-12), weight

    of_site, weight = averaged(near(sites.rank) * (sites.rank[:, None] != sites.rank))
    of_point, _ = averaged(near(where))
    # As many independent squares as sites in a neighbourhood times features that have a say.
    squares = jnp.maximum(sites.live, 1) / jnp.maximum(jnp.sum(jnp.sum(weight**2, axis=1) * live), 1e-30)
    chance = _trigamma(0.5 * squares / jnp.sum(share**2))
    alike = live / jnp.maximum(sites.live, 1)
    _, kept = _shrunk(of_site, alike, chance)
    # Of what degrees of freedom the logarithm of a mean square has this variance.
    doubt = (jnp.sqrt(1 + 2 * kept[:, 0] * chance) - 1) / 2
    return jnp.exp(kept * of_site), jnp.exp(kept * of_point), doubt


def _trigamma(x):
    """The variance of the logarithm of a chi-squared variable of 2x degrees of freedom, to 1e-5; compiles fast."""
    z = x + 3
    series = 1 / z + 1 / (2 * z**2) + 1 / (6 * z**3) - 1 / (30 * z**5)
    return series + 1 / x**2 + 1 / (x + 1) ** 2 + 1 / (x + 2) ** 2


def _student(over_freedom):
    """The square of how much wider than the normal distribution Student's t is, by 1 / (degrees of freedom)."""
    grid = np.linspace(0, 1, 65)
    wider = (stdtrit(1 / np.maximum(grid, 1e-9), 0.95) / WITHIN) ** 2
    return jnp.interp(jnp.minimum(over_freedom, 1), grid, jnp.asarray(wider))
