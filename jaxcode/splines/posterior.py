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

All is linear algebra of the knots' size, and products of its matrices with the data. Contrasts of the data that know
nothing of polynomials below degree m are divided differences,

.. math::
    z_j = m! \, [t_j, \ldots, t_{j+m}] y = \int u^{(m)} M_j, \qquad
    \mathrm{cov}(z) = b \, (R + \mu Q^T W^{-1} Q), \quad R_{ij} = \int M_i M_j,

with :math:`M_j` the B-spline of order m whose integral is one, and Q the coefficients of the differences. A value at a
point is the polynomial through the m knots nearest to it plus one more contrast, which the others predict. B-splines'
Gram matrices are well conditioned whatever the knots, where those of :math:`|s - t|^{2m-1}` lose every digit.

References:
    Wahba, Journal of the Royal Statistical Society B 40 (1978). Curry and Schoenberg, Journal d'Analyse Mathematique 17
    (1966). Geisser and Eddy, Journal of the American Statistical Association 74 (1979), for predictive likelihood.
    Karvonen et al., SIAM/ASA Journal on Uncertainty Quantification 8 (2020), for how Gaussian processes misjudge
    functions smoother than they are.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Inexact
from scipy.special import stdtrit

from .._checks import is_concrete
from .._float64 import in_float64
from .sequence import SAME_PLACE

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


def unit_variances(
    knots: ArrayLike, points: ArrayLike, weights: ArrayLike, smoothing: ArrayLike = 0.0
) -> Float[Array, "points"]:
    r"""Posterior variances of the integrated Wiener process of unit scale whose mean the smoothing spline is.

    With :math:`\kappa(s, t) = |s - t|^3 / 12`, d the spline's row for a point, K the kernel among knots and c from
    knots to the point, each is :math:`d^T K d - 2 d^T c + \mu \sum_i d_i^2 / w_i`.

    Args:
        knots: Shape (n,), ascending; neighbours may be equal.
        points: Shape (p,), in any order.
        weights: Shape (n,), not negative; zero leaves the knot out.
        smoothing: :math:`\mu \ge 0`.

    Returns:
        Shape (p,), in the knots' unit cubed; float64 with x64 on, else float32. Infinite with data at fewer than two
        places.

    References:
        Wahba, Journal of the Royal Statistical Society B 40 (1978).

    >>> unit_variances(np.array([-1.0, 1.0]), np.array([0.0, 0.5, 1.0]), np.ones(2)) * 96
    Array([16.,  9.,  0.], dtype=float32)
    """
    return _unit_variances(knots, points, weights, smoothing).astype(jnp.result_type(float))


class _Sites(NamedTuple):
    """Places that have data, in ascending order, followed by others that have none.

    Attributes:
        place: Where, strictly ascending, shape (n,); at least as many as knots.
        weight: Of the data there, together; 1 at those that have none.
        live: How many have data.
        average: From data at the knots to their means at the sites, shape (n, knots).
    """

    place: Float[Array, "sites"]
    weight: Float[Array, "sites"]
    live: Array
    average: Float[Array, "sites knots"]

    @property
    def rank(self) -> Array:
        """0, 1, 2, ..."""
        return jnp.arange(self.place.shape[0], dtype=jnp.int32)


class _Process(NamedTuple):
    """What a process of one order makes of data at the sites; variances for unit scale.

    Attributes:
        precision: Inverse covariance of the data where polynomials below the order are unknown, shape (sites, sites).
        rows: From the data to posterior means at the points, shape (points, sites).
        variance: Posterior variances there, shape (points,).
    """

    precision: Float[Array, "sites sites"]
    rows: Float[Array, "points sites"]
    variance: Float[Array, "points"]


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


@in_float64
@jax.jit
def _unit_variances(knots, points, weights, smoothing):
    sites = _find_sites(knots, weights)
    return jnp.where(sites.live >= 2, _process(sites, points, 2, smoothing).variance, jnp.inf)


def _errors(noisy, knots, values, points, weights, smoothing, rounding):
    sites = _find_sites(knots, weights)
    data = sites.average @ jnp.where(weights[:, None] > 0, values, 0)
    # Relative to their size, so that squares neither vanish nor overflow.
    size = jnp.max(jnp.abs(data), axis=0)
    size = jnp.where(size > 0, size, 1)
    data = data / size

    processes = [(m, _process(sites, points, m)) for m in ORDERS]
    spline = dict(processes)[2]
    if noisy:
        spline = _process(sites, points, 2, smoothing)
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


def _find_sites(knots, weights):
    # One more, at least, than the highest order has polynomials.
    n = max(knots.shape[0], 5)
    index = jnp.arange(n, dtype=jnp.int32)
    weights, span = weights.astype(knots.dtype), knots[-1] - knots[0]
    apart = jnp.concatenate([jnp.zeros(1, bool), jnp.diff(knots) > SAME_PLACE * span])
    site = jnp.cumsum(apart, dtype=jnp.int32)
    total = jnp.zeros(n, knots.dtype).at[site].add(weights)
    live = total > 0
    count = jnp.sum(live, dtype=jnp.int32)
    rank = jnp.where(live, jnp.cumsum(live) - 1, count + jnp.cumsum(~live) - 1).astype(jnp.int32)
    total = jnp.zeros_like(total).at[rank].set(total)
    place = jnp.zeros(n, knots.dtype).at[rank[site]].set(knots)
    beyond = index >= count
    last = place[jnp.maximum(count - 1, 0)]
    place = jnp.where(beyond, jax.lax.stop_gradient(last + (index - count + 1) * (span / n)), place)
    total = jnp.where(beyond, 1, total)
    average = jnp.where(rank[site] == index[:, None], weights / total[:, None], 0)
    return _Sites(place, total, count, average)


def _process(sites, points, m, smoothing=None):
    """The posterior under a Wiener process integrated m - 1 times; without smoothing there is no noise."""
    place, n, p = sites.place, sites.place.shape[0], points.shape[0]
    row = np.arange(n - m)[:, None]
    window = row + np.arange(m + 1)
    away = place[window][:, :, None] - place[window][:, None, :] + np.eye(m + 1)
    there = sites.rank[m:] < sites.live
    coefficients = jnp.where(there[:, None], math.factorial(m) / jnp.prod(away, axis=2), 0)
    contrasts = jnp.zeros((n - m, n)).at[row, window].set(coefficients)

    at, measure = _quadrature(place, m)
    splines = jnp.where(there, _bsplines(place, at, m), 0)
    gram = (splines * measure[:, None]).T @ splines
    if smoothing is not None:
        gram = gram + smoothing * (contrasts / sites.weight) @ contrasts.T
    # Symmetric of bandwidth m, scaled to a diagonal of ones: row i holds what stands at i, i - 1, ..., i - m.
    before = row - np.arange(m + 1)
    scale = jnp.where(there, 1 / jnp.sqrt(jnp.where(there, jnp.diagonal(gram), 1)), 0)
    bands = jnp.where(before >= 0, scale[:, None] * gram[row, before] * scale[before], 0)
    bands = bands.at[:, 0].set(1)

    start = jnp.sum(place < points[:, None], axis=1, dtype=jnp.int32) - m // 2
    near = jnp.clip(start, 0, jnp.maximum(sites.live - m, 0))[:, None] + np.arange(m, dtype=np.int32)
    t = place[near]
    to_point = points[:, None] - t
    others = ~np.eye(m, dtype=bool)
    lagrange = jnp.prod(
        jnp.where(others, to_point[:, None, :], 1) / jnp.where(others, t[:, :, None] - t[:, None, :], 1), axis=2
    )
    polynomial = jnp.zeros((p, n)).at[np.arange(p)[:, None], near].set(lagrange)

    # The contrast of those sites and the point.
    size = jnp.prod(to_point, axis=1) / math.factorial(m)
    ends = jnp.full((p, 1), jnp.inf)
    local = jnp.maximum(
        jnp.concatenate([-ends, t], axis=1), jnp.minimum(jnp.concatenate([t, ends], axis=1), points[:, None])
    )
    at, measure = _quadrature(local, m)
    own = measure * _bsplines(local, at, m)[..., 0]
    splines = jnp.where(there, _bsplines(place, at.reshape(-1), m), 0).reshape(*at.shape, n - m)
    cross = size[:, None] * jnp.einsum("pq,pqj->pj", own, splines)
    variance = size**2 * jnp.sum(own**2 / jnp.where(measure > 0, measure, 1), axis=1)
    if smoothing is not None:
        cross = cross - smoothing * (polynomial / sites.weight) @ contrasts.T
        variance = variance + smoothing * jnp.sum(polynomial**2 / sites.weight, axis=1)

    both = scale[:, None] * jnp.concatenate([contrasts, cross.T], axis=1)
    white = _whitened(bands, both)
    white, known = white[:, :n], white[:, n:]
    variance = jnp.maximum(variance - jnp.sum(known**2, axis=0), 0)
    return _Process(white.T @ white, polynomial + known.T @ white, variance)


def _whitened(bands, columns):
    """Columns from the left by the inverse of the Cholesky factor of a banded matrix, row by row.

    Batched factorizations of LAPACK's that run side by side can wait for each other forever on a CPU of few cores.
    """
    m = bands.shape[1] - 1

    def step(carry, row):
        # The factor's rows i - 1, ..., i - m, each from its diagonal to the left, and what has been solved there.
        factor, solved = carry
        band, column = row
        new = [None] * (m + 1)
        for j in range(m, 0, -1):
            known = sum(new[k] * factor[j - 1, k - j] for k in range(j + 1, m + 1))
            new[j] = (band[j] - known) / factor[j - 1, 0]
        new[0] = jnp.sqrt(band[0] - sum(new[j] ** 2 for j in range(1, m + 1)))
        column = (column - sum(new[j] * solved[j - 1] for j in range(1, m + 1))) / new[0]
        factor = jnp.concatenate([jnp.stack(new)[None], factor[:-1]])
        return (factor, jnp.concatenate([column[None], solved[:-1]])), column

    unit = jnp.zeros((m, m + 1), bands.dtype).at[:, 0].set(1)
    start = unit, jnp.zeros((m, columns.shape[1]), bands.dtype)
    return jax.lax.scan(step, start, (bands, columns))[1]


def _bsplines(knots, at, order):
    """B-splines whose integrals are one, at places: shape (..., places, knots - order)."""
    t, x = knots[..., None, :], at[..., :, None]
    gap = t[..., 1:] - t[..., :-1]
    found = jnp.where((x >= t[..., :-1]) & (x < t[..., 1:]), 1 / jnp.where(gap > 0, gap, 1), 0)
    for k in range(2, order + 1):
        span = t[..., k:] - t[..., :-k]
        mixed = (x - t[..., :-k]) * found[..., :-1] + (t[..., k:] - x) * found[..., 1:]
        found = k / (k - 1) * mixed / jnp.where(span > 0, span, 1)
    return found


def _quadrature(knots, order):
    """Places and weights that integrate products of two such splines exactly, all gaps' in one row."""
    at, weight = np.polynomial.legendre.leggauss(order)
    gap = (knots[..., 1:] - knots[..., :-1])[..., None]
    flat = (*knots.shape[:-1], -1)
    return (knots[..., :-1, None] + gap * (at + 1) / 2).reshape(flat), (gap * weight / 2).reshape(flat)


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
