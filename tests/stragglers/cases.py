"""Latencies with their laws, and draws of many masks or latencies at once."""

import functools

import jax
import scipy.stats

from jaxcode import stragglers as sg

# A correct sampler falls below it for one key in a thousand. The keys are fixed, so a test passes always or never.
SMALLEST_P_VALUE = 1e-3
# Where jaxtyping's runtime checker is on, it sees a wrong type first, and raises a TypeError.
WRONG_TYPE = (ValueError, TypeError)

EXPONENTIAL = sg.ShiftedExponential(shift=0.1, scale=0.02)
LATENCIES = {
    "shifted exponential": (EXPONENTIAL, scipy.stats.expon(loc=0.1, scale=0.02)),
    "pareto": (sg.Pareto(minimum=0.1, shape=1.5), scipy.stats.pareto(1.5, scale=0.1)),
    "lognormal": (sg.LogNormal(median=0.3, sigma=0.7), scipy.stats.lognorm(0.7, scale=0.3)),
    # The sum of two exponentials of one scale.
    "by host": (
        sg.CorrelatedByHost(sg.ShiftedExponential(0, 0.2), sg.ShiftedExponential(1, 0.2), 1),
        scipy.stats.gamma(2, loc=1, scale=0.2),
    ),
}


@functools.partial(jax.jit, static_argnums=(2, 3))
def draw(model, key, num_workers=30, num_draws=2000):
    return jax.vmap(lambda key: model.sample(key, num_workers))(jax.random.split(key, num_draws))
