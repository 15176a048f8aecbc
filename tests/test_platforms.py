"""Programs for TPU and GPU, lowered here without one: operations that only CPUs have are refused there."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import export

from jaxcode import Plan, Prior, SplineCode, coded, ordering, robust, saga

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


def infer(x, returned):
    """All parts of coded inference that are traced."""
    predict = coded(jnp.tanh, SPLINE, order=ordering.greedy, defence=robust.leave_one_out)
    return predict(x, returned)


def infer_with_plan(x, returned):
    """Replication whose assignment and prior depend on the inputs."""
    predict = coded(jnp.tanh, CODES["replication"], planner=plan_by_size)
    return predict(x, returned)


def plan_by_size(code, x):
    served = jnp.argsort(jnp.sum(x**2, axis=-1))[jnp.arange(code.num_workers) % code.num_data]
    return Plan(served.astype(jnp.int32), Prior(jnp.tanh(x)[served], jnp.tanh(x)))


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
    "a coded call": (infer, [shaped(9, 3, dtype=jnp.bfloat16), mask(SPLINE)]),
    "a coded call with a plan": (infer_with_plan, [shaped(9, 3), mask(SPLINE)]),
    "saga": (many_rounds, [shaped(64, 3), shaped(64), jax.eval_shape(lambda: jax.random.key(0))]),
    "error locator": (functools.partial(robust.error_locator, SPLINE, num_faulty=1), [shaped(12, 2, 3), mask(SPLINE)]),
}


def lower(program, arguments, platform):
    return export.export(jax.jit(program), platforms=[platform])(*arguments)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", CASES)
def test_lowers_for_accelerators(name, platform):
    assert lower(*CASES[name], platform).platforms == (platform,)


def test_operations_of_cpus_alone_are_refused():
    with pytest.raises(NotImplementedError, match="schur"):
        lower(jax.lax.linalg.schur, [shaped(3, 3)], "tpu")
