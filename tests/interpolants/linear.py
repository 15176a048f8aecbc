"""The example of the guide to writing an interpolant, as a user would have it in a file of their own."""

import jax.numpy as jnp

import jaxcode as jc
from jaxcode import interpolants


@jc.pytree()
class Linear(interpolants.AbstractInterpolant):
    """Connects the data by straight lines; constant beyond the outermost."""

    interpolates = True
    predicts_error = False

    def linop(self, knots, points, returned=None):
        return interpolants.dense_linop(form_matrix, knots, points, returned)


def form_matrix(knots, points, live):
    # The nearest live knots on either side of each point weigh by their distance; one alone has all the weight.
    distance = points[:, None] - knots[None]
    lower_knot = jnp.max(jnp.where(live & (distance >= 0), knots, -jnp.inf), axis=1, keepdims=True)
    upper_knot = jnp.min(jnp.where(live & (distance < 0), knots, jnp.inf), axis=1, keepdims=True)
    is_inside = jnp.isfinite(lower_knot) & jnp.isfinite(upper_knot)
    gap = jnp.where(is_inside, upper_knot - lower_knot, 1.0)
    weight = jnp.where(is_inside, 1 - jnp.abs(distance) / gap, 1.0)
    return jnp.where(live & ((knots == lower_knot) | (knots == upper_knot)), weight, 0.0)
