r"""Predicts values at points from values at sites in a space of features, by a Gaussian process.

Unlike a curve, whose only coordinate is the node, a Gaussian process reads sites where they lie. Its covariance is

.. math:: k(x, x') = \rho(\|x - x'\| / \ell) + \eta \, [x \text{ and } x' \text{ are one site}]

with Matérn's correlation :math:`\rho`, of smoothness 1/2, 5/2, 9/2 or 13/2, a length :math:`\ell`, and a share
:math:`\eta` of which other sites tell nothing: as :math:`\eta` grows, values away from the sites return to their
mean. (A squared exponential, infinitely smooth, was tried: where it fits a few dozen values best, its curves between
hundreds are wild.) Values at the sites themselves are kept in any case. The mean is zero, of residuals to a prior for
instance, or an unknown constant. Everything is computed in float64.

References:
    Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, sections 2.7 (unknown mean), 4.2
    (covariances) and 5.4 (marginal likelihood).
"""

import functools
from typing import NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from .._float64 import in_float64
from .._pytree import pytree
from ..linops.dense import matmul

__all__ = ["SMOOTHNESSES", "Process", "Sites", "eliminate", "fit_process", "posterior", "spread_of"]

# Added to the variance at each site, in units of the correlation at distance zero. Sites so near to each other that
# values at one tell those at the other to five digits, of which float32 has seven, count as one.
JITTER = 1e-10

# Of processes; p + 1/2 for p = 0, 2, 4 and 6.
SMOOTHNESSES = (0.5, 2.5, 4.5, 6.5)
# Coefficients, by powers, of the reverse Bessel polynomials of degree p. Matérn's correlation is such a polynomial of
# the scaled distance over its value at 0, times an exponential (Rasmussen and Williams, equation 4.16). Whole numbers,
# because constants of float64 lose their digits where a program in float32 is compiled around this one.
_POLYNOMIALS = (
    (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    (3.0, 3.0, 1.0, 0.0, 0.0, 0.0, 0.0),
    (105.0, 105.0, 45.0, 10.0, 1.0, 0.0, 0.0),
    (10395.0, 10395.0, 4725.0, 1260.0, 210.0, 21.0, 1.0),
)

# Processes that `fit_process` chooses from: lengths, in units of the largest distance between sites, and shares without
# correlation. From values of a handful of sites, steps that are finer cannot be distinguished.
_LENGTHS = tuple(np.geomspace(0.05, 3.0, 8))
_NUGGETS = (0.0, 0.1, 1.0, 10.0, 1000.0)


@final
@pytree(eq=False)
class Process:
    r"""Holds the parameters of a covariance.

    Attributes:
        smoothness: 0.5, 2.5, 4.5 or 6.5: paths have no derivative, two, four or six.
        length: :math:`\ell > 0`, in the unit of the features.
        nugget: :math:`\eta \ge 0`.
    """

    smoothness: Float[ArrayLike, "..."]
    length: Float[ArrayLike, "..."]
    nugget: Float[ArrayLike, "..."]

    def correlation(self, squares: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Computes the correlation at squared distances."""
        # The root has no derivative at 0, where the correlation has one, which is 0. What replaces 0 is as good as 0,
        # because XLA may compute squares once for the condition and again for the root, and only one of them is 0.
        is_positive = squares > 0
        distance = jnp.where(is_positive, jnp.sqrt(jnp.where(is_positive, squares, 1e-30)), 0) / self.length
        number = jnp.clip(jnp.round((jnp.asarray(self.smoothness) - 0.5) / 2), 0, len(SMOOTHNESSES) - 1)
        root = jnp.sqrt(4 * number + 1) * distance
        coefficients = [
            sum(jnp.where(number == i, value, 0.0) for i, value in enumerate(values))
            for values in zip(*_POLYNOMIALS, strict=True)
        ]
        polynomial = functools.reduce(lambda value, coefficient: value * root + coefficient, reversed(coefficients))
        return polynomial / coefficients[0] * jnp.exp(-root)


class Sites(NamedTuple):
    """Holds places in the space of features.

    Attributes:
        features: Where they are, (n, features).
        label: Places with equal labels are one site, int (n,).
    """

    features: Float[Array, "sites features"]
    label: Int[Array, "sites"]


@in_float64
@jax.jit
def posterior(process, sites, points, live, has_mean):
    r"""Computes the weights of the values at sites in the posterior mean at points, and its variance.

    Args:
        process: A `Process`, of scalars.
        sites: `Sites`, n of them.
        points: `Sites`, q of them; the sites themselves if None.
        live: Which sites have values, bool (n,), at least one of them.
        has_mean: 1.0 for an unknown constant mean, 0.0 for a mean of zero.

    Returns:
        Weights, float64 (q, n), 0 for sites without values; where a point is a site with a value, that value alone has
        weight. And variances, float64 (q,), in units of the variance that `fit_process` estimates.
    """
    num_sites = live.shape[0]
    if points is None:
        points, between_sites = sites, _squares(sites.features)
        to_points = between_sites
    else:
        squares = _squares(jnp.concatenate([sites.features, points.features]))[:, :num_sites]
        between_sites, to_points = squares[:num_sites], squares[num_sites:]
    covariance = _covariance(process, sites, between_sites, live)
    same = (points.label[:, None] == sites.label[None]) & live[None]
    cross = process.correlation(to_points) + process.nugget * same
    cross = jnp.where(live[None], cross, 0.0)
    ones = jnp.where(live, has_mean, 0.0)
    solutions = _solve(covariance, jnp.concatenate([cross, ones[None]]).T)
    weights, mean_weights = solutions[:, :-1].T, solutions[:, -1]
    variance = 1 + process.nugget - jnp.sum(cross * weights, axis=1)
    # The mean by generalised least squares.
    precision = jnp.sum(ones * mean_weights)
    precision = jnp.where(precision > 0, precision, 1.0)
    missing = has_mean - jnp.sum(ones[None] * weights, axis=1)
    weights = weights + missing[:, None] * mean_weights[None] / precision
    variance = variance + missing**2 / precision
    # One of the values of a site is the result there, in all its digits.
    first = same & (jnp.cumsum(same, axis=1) == 1)
    is_site = jnp.any(same, axis=1)
    weights = jnp.where(is_site[:, None], jnp.where(first, 1.0, 0.0), weights)
    return weights, jnp.where(is_site, 0.0, jnp.maximum(variance, JITTER))


@in_float64
@jax.jit
def fit_process(sites, live, values, has_mean, process=None):
    r"""Chooses the process under which the values at sites are most likely, and estimates its variance.

    The likelihood is that of the differences from the mean (restricted), with the variance of each feature of the
    values at its maximum; the logarithms are averaged over features, and summed over sets of sites, which are taken
    for independent.

    Args:
        sites: `Sites` with the sets as leading axis, leaves (sets, n, ...).
        live: Which sites have values, bool (sets, n).
        values: (sets, n, features); those of other sites are not read.
        has_mean: As for `posterior`.
        process: The only `Process` to choose from, of which the variance is estimated; if None, those of a grid.

    Returns:
        The `Process`, and the variance of each feature, (features,); the latter, and which process is chosen, are
        constant to derivatives.
    """
    # Further values at one site say nothing new, and would make the variance seem smaller.
    same = sites.label[:, :, None] == sites.label[:, None]
    is_earlier = np.arange(live.shape[1])[:, None] > np.arange(live.shape[1])[None]
    live = live & ~jnp.any(same & live[:, None] & is_earlier[None], axis=2)
    values = jnp.where(live[:, :, None], values, 0.0)
    if process is None:
        extent = spread_of(sites.features)
        grid = np.array([(s, length, nugget) for s in SMOOTHNESSES[1:] for length in _LENGTHS for nugget in _NUGGETS])
        smoothness, length, nugget = jnp.asarray(grid).T
        candidates = Process(smoothness, length * extent, nugget)
    else:
        candidates = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], process)

    def measure(process):
        return jax.vmap(functools.partial(_restricted, process, has_mean))(sites, distances, live, values)

    # Which candidate is best is constant to derivatives; the length of the one chosen moves with the sites.
    sites, values = jax.lax.stop_gradient((sites, values))
    distances = jax.vmap(_squares)(sites.features)
    log_determinants, squares = jax.lax.map(measure, jax.lax.stop_gradient(candidates))
    # (candidates, sets) and (candidates, sets, features).
    num_sets = live.shape[0]
    count = jnp.maximum(jnp.sum(jnp.where(live, 1.0, 0.0)) - num_sets * has_mean, 1.0)
    variances = jnp.sum(squares, axis=1) / count
    # Features that are constant do not tell the candidates apart.
    floor = 1e-30 + 1e-20 * jnp.max(variances, axis=1, keepdims=True)
    scores = count * jnp.mean(jnp.log(variances + floor), axis=1) + jnp.sum(log_determinants, axis=1)
    scores = jnp.where(jnp.isnan(scores), jnp.inf, scores)
    index = jnp.arange(len(scores))
    best = jnp.min(jnp.where(scores == jnp.min(scores), index, len(scores) - 1))
    chosen = jax.tree.map(lambda leaf: jnp.sum(jnp.where(index == best, leaf, 0.0)), candidates)
    return chosen, jnp.sum(jnp.where((index == best)[:, None], variances, 0.0), axis=0)


def spread_of(features: Float[Array, "groups sites features"]) -> Float[Array, ""]:
    """Computes the mean over groups of the largest distance between places; 1 where it is zero."""
    largest = jnp.max(jax.vmap(_squares)(features), axis=(1, 2))
    is_positive = largest > 0
    spread = jnp.mean(jnp.where(is_positive, jnp.sqrt(jnp.where(is_positive, largest, 1.0)), 0.0))
    return jnp.where(spread > 0, spread, 1.0)


def _covariance(process, sites, squares, live):
    """Computes the covariance of the live sites at squared distances, with ones on the diagonal for the others."""
    same = sites.label[:, None] == sites.label[None]
    covariance = process.correlation(squares) + process.nugget * same
    covariance = jnp.where(live[:, None] & live[None], covariance, 0.0)
    return covariance + jnp.eye(live.shape[0]) * jnp.where(live, JITTER, 1.0)


def _restricted(process, has_mean, sites, squares, live, values):
    """Computes the log determinant of the restricted likelihood, and the quadratic form of each feature."""
    ones = jnp.where(live, has_mean, 0.0)
    rows = jnp.concatenate([values, ones[:, None]], axis=1)
    upper, half = eliminate(_covariance(process, sites, squares, live), rows)
    half, half_ones = half[:, :-1], half[:, -1:]
    precision = jnp.sum(half_ones**2)
    precision = jnp.where(precision > 0, precision, 1.0)
    half = half - half_ones * jnp.sum(half_ones * half, axis=0)[None] / precision
    return 2 * jnp.sum(jnp.log(jnp.diagonal(upper))) + jnp.log(precision), jnp.sum(half**2, axis=0)


# LAPACK's factorizations of several matrices, under `vmap` for instance, can wait for each other forever on a CPU of
# few cores. So they are written as loops, which also run the same way on accelerators.


def eliminate(matrix, rows):
    """Computes the Cholesky factor U of a matrix U^T U, upper triangular, and the solution of U^T X = rows."""
    size = matrix.shape[0]
    augmented = jnp.concatenate([matrix, rows], axis=1)

    def add_row(j, upper):
        row = augmented[j] - matmul(upper[:, j][None], upper)[0]
        return upper.at[j].set(row / jnp.sqrt(jnp.maximum(row[j], JITTER**2)))

    upper = jax.lax.fori_loop(0, size, add_row, jnp.zeros_like(augmented))
    return jnp.triu(upper[:, :size]), upper[:, size:]


def _solve(matrix, rows):
    """Solves a symmetric positive definite system; its derivatives are solutions of the same system."""

    def solve(_, rows):
        upper, half = eliminate(jax.lax.stop_gradient(matrix), rows)
        size = matrix.shape[0]

        def substitute(step, solution):
            j = size - 1 - step
            known = matmul(upper[j][None], solution)[0]
            return solution.at[j].set((half[j] - known) / upper[j, j])

        return jax.lax.fori_loop(0, size, substitute, jnp.zeros_like(half))

    return jax.lax.custom_linear_solve(lambda solution: matmul(matrix, solution), rows, solve, symmetric=True)


def _squares(places: Float[Array, "n features"]) -> Float[Array, "n n"]:
    """Computes squared distances, as one product of matrices.

    Only of all places at once: XLA may compute float32 features again for each use, with other rounding, which is more
    than near sites differ by.
    """
    places = places - jax.lax.stop_gradient(jnp.mean(places, axis=0, keepdims=True))
    products = matmul(places, places.T)
    norms = jnp.sum(jnp.where(np.eye(len(places), dtype=bool), products, 0.0), axis=1)
    return jnp.maximum(norms[:, None] + norms[None] - 2 * products, 0.0)
