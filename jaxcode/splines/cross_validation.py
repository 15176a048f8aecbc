r"""How much to smooth, by generalised cross-validation: from the data themselves, without any truth.

A smoothing spline fitted to y at knots is :math:`A_\mu y` there, and

.. math::
    V(\mu) = \frac{n \, \|(I - A_\mu) y\|^2}{(\operatorname{tr}(I - A_\mu))^2}

estimates the error of predicting each datum from the others. With :math:`\kappa(s, t) = |s - t|^3 / 12` between knots
in a matrix K, and P the projection that takes straight lines out of data,
:math:`I - A_\mu = \mu P (P K P + \mu I)^{-1} P`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from .._checks import check_ascending, check_mask, check_smoothing, check_values, check_vector
from .._float64 import fixed_in_float64, in_float64

# Logarithms of smoothings that are tried, from the largest eigenvalue of P K P: beyond them, nothing is smoothed that
# double precision could tell, or all is.
_TRIED = np.linspace(np.log(1e-14), np.log(1e4), 64)
_NEWTON_STEPS = 8


def gcv_score(
    knots: ArrayLike,
    values: Shaped[Array, "knots *features"],
    *,
    smoothing: ArrayLike,
    returned: ArrayLike | None = None,
) -> Float[Array, ""]:
    r"""The generalised cross-validation score of a smoothing, summed over features.

    Args:
        knots: Positions, shape (n,), ascending; neighbours may be equal.
        values: Data, shape (n, ...).
        smoothing: :math:`\mu > 0`, SciPy's `lam`.
        returned: Which knots have data, bool, shape (n,); all if not given.

    Returns:
        The score, in the units of the data squared; NaN with data at two knots or fewer, which any straight line
        meets.

    Raises:
        ValueError: If a concrete argument has the wrong shape, dtype or sign, or knots are not ascending.

    References:
        Craven and Wahba, Numerische Mathematik 31 (1979).
    """
    check_smoothing("smoothing", smoothing)
    return _score(smoothing, *_checked(knots, values, returned)).astype(jnp.result_type(float))


def gcv_smoothing(
    knots: ArrayLike, values: Shaped[Array, "knots *features"], *, returned: ArrayLike | None = None
) -> Float[Array, ""]:
    r"""The smoothing with the lowest score: one for all features.

    Differentiable by the values, with the implicit function theorem; knots count as fixed. Time O(n^3 + n^2 d), for up
    to some hundred knots.

    Args:
        knots: As for `gcv_score`.
        values: As for `gcv_score`.
        returned: As for `gcv_score`.

    Returns:
        :math:`\mu > 0`, SciPy's `lam`; divided by the number of data it is a code's smoothing. 0 with data at two
        knots or fewer.

    Raises:
        ValueError: As for `gcv_score`.

    References:
        Craven and Wahba, Numerische Mathematik 31 (1979).

    >>> t = np.linspace(-1, 1, 40)
    >>> noise = np.random.default_rng(0).normal(size=40)
    >>> bool(gcv_smoothing(t, jnp.asarray(np.sin(3 * t) + 0.3 * noise)) > 1e3 * gcv_smoothing(t, jnp.sin(3 * t)))
    True
    """
    return _best(*_checked(knots, values, returned))


def _checked(knots, values, returned):
    check_vector("knots", knots)
    check_ascending("knots", knots)
    n = np.shape(knots)[0]
    values = jnp.asarray(values)
    check_values("values", values, n)
    if returned is None:
        returned = np.ones(n, bool)
    check_mask("returned", returned, n)
    return knots, values.reshape(n, -1), returned


def _parts(knots, values, returned):
    """The kernel without straight lines; the projection; the data's inner products. All in float64."""
    live = jnp.asarray(returned).astype(knots.dtype)
    centre = jnp.sum(live * knots) / jnp.maximum(jnp.sum(live), 1)
    lines = jnp.stack([live, live * (knots - centre)], axis=1)
    norms = jnp.sum(lines**2, axis=0)
    lines = lines / jnp.sqrt(jnp.where(norms > 0, norms, 1))
    projection = jnp.diag(live) - lines @ lines.T
    kernel = jnp.abs(knots[:, None] - knots) ** 3 / 12
    kernel = projection @ kernel @ projection
    values = projection @ jnp.where(jnp.asarray(returned)[:, None], values, 0)
    return kernel, projection, values @ values.T, jnp.sum(live)


@in_float64
@jax.jit
def _score(smoothing, knots, values, returned):
    kernel, projection, gram, count = _parts(knots, values, returned)
    factor = jax.scipy.linalg.cho_factor(kernel + smoothing * jnp.eye(len(kernel)))
    left = smoothing * projection @ jax.scipy.linalg.cho_solve(factor, projection)
    return jnp.where(count > 2, count * jnp.sum((left @ gram) * left) / jnp.trace(left) ** 2, jnp.nan)


def _best(knots, values, returned):
    best, curvature, left = fixed_in_float64(_lowest, knots, values, returned)
    data = jnp.where(jnp.asarray(returned)[:, None], values, 0).astype(left.dtype)
    # What is left of the data, and its derivative by the logarithm of the smoothing; from both, log V's, but for a
    # constant. Nothing but derivatives is left of it: at the minimum it is zero, and stays so as the data move.
    residual = left @ data
    change = residual - left @ residual
    energy = jnp.sum(residual**2)
    slope = 2 * jnp.sum(residual * change) / jnp.where(energy > 0, energy, 1)
    bends = curvature > 0
    best = best - jnp.where(bends, (slope - jax.lax.stop_gradient(slope)) / jnp.where(bends, curvature, 1), 0)
    return jnp.where(jnp.sum(jnp.asarray(returned)) > 2, jnp.exp(best), 0)


@jax.jit
def _lowest(knots, values, returned):
    """The logarithm of the best smoothing, log V's second derivative there, and I - A."""
    kernel, projection, gram, _ = _parts(knots, values, returned)
    # What is not in the data, straight lines and missing knots, must not pass for what can hardly be smoothed.
    kernel = kernel + jnp.trace(kernel) * (jnp.eye(len(kernel)) - projection)
    # In this basis smoothing shrinks every component by itself.
    eigenvalues, vectors = jnp.linalg.eigh(kernel)
    power = jnp.sum((vectors.T @ gram) * vectors.T, axis=1)
    part = jnp.sum((vectors.T @ projection) * vectors.T, axis=1)

    def left_over(log_smoothing):
        return jax.nn.sigmoid(log_smoothing - jnp.log(jnp.maximum(eigenvalues, 1e-300)))

    def score(log_smoothing):
        over = left_over(log_smoothing)
        return jnp.log(jnp.sum(power * over**2) + 1e-300) - 2 * jnp.log(jnp.sum(part * over) + 1e-300)

    slope_at = jax.grad(score)
    curvature_at = jax.grad(slope_at)
    tried = jnp.log(jnp.maximum(jnp.max(eigenvalues), 1e-300)) + jnp.asarray(_TRIED)
    # In float32: with x64 off the reduction of wider numbers is lowered for narrow ones.
    coarse = tried[jax.lax.argmin(jax.vmap(score)(tried).astype(jnp.float32), 0, jnp.int32)]
    step = tried[1] - tried[0]

    def newton(best, _):
        slope, curvature = slope_at(best), curvature_at(best)
        move = jnp.where(curvature > 0, slope / jnp.where(curvature > 0, curvature, 1), step / 8 * jnp.sign(slope))
        return jnp.clip(best - move, coarse - step, coarse + step), None

    best = jax.lax.scan(newton, coarse, length=_NEWTON_STEPS)[0]
    left = projection @ (vectors * left_over(best)) @ vectors.T @ projection
    return best, curvature_at(best), left
