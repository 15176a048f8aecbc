"""Programs for TPU and GPU, lowered here without one: what only CPUs can compute is refused there."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import export

from jaxcode import SplineCode, coded, ordering, robust, saga

from .codes.cases import CODES, PROGRAMS

SPLINE = CODES["spline-smoothed"]
MANY = SplineCode.chebyshev(200, 600)


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def mask(code):
    return shaped(code.num_workers, dtype=bool)


def slopes(code, y, returned):
    """Derivatives by answers, of a decoder whose mask is traced."""
    return jax.grad(lambda y: jnp.sum(code.decode(y, returned) ** 2))(y)


def in_one(x, returned):
    """All of coded inference that is traced, for an accelerator whose batches are narrow."""
    predict = coded(jnp.tanh, SPLINE, order=ordering.greedy, defence=robust.leave_one_out)
    return predict(x, returned)


def many_rounds(x, y, key):
    method = saga.DistributedSaga(saga.logistic, 4, 8, 0.1)
    state = method.init(jnp.zeros(3), (x, y))
    return method.round(state, key).params


CASES = {
    name: (functools.partial(slopes, CODES[name]), [shaped(CODES[name].num_workers, 3), mask(CODES[name])])
    for name in PROGRAMS
} | {
    "many workers": (functools.partial(slopes, MANY), [shaped(600, 3), mask(MANY)]),
    "error bars": (SPLINE.decode_with_error, [shaped(12, 3), mask(SPLINE)]),
    "a coded call": (in_one, [shaped(9, 3, dtype=jnp.bfloat16), mask(SPLINE)]),
    "saga": (many_rounds, [shaped(64, 3), shaped(64), jax.eval_shape(lambda: jax.random.key(0))]),
    "error locator": (functools.partial(robust.error_locator, SPLINE, num_liars=1), [shaped(12, 3), mask(SPLINE)]),
}


def lower(program, arguments, platform):
    return export.export(jax.jit(program), platforms=[platform])(*arguments)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", CASES)
def test_lowers_for_accelerators(name, platform):
    assert lower(*CASES[name], platform).platforms == (platform,)


def test_what_only_cpus_compute_is_refused():
    with pytest.raises(NotImplementedError, match="schur"):
        lower(jax.lax.linalg.schur, [shaped(3, 3)], "tpu")
