"""Float64 inside programs of any precision: values and every kind of derivative, with x64 off and on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode._float64 import in_float64

INDEX = np.array([2, 0, 2, 1], np.int32)
MATRIX = np.random.default_rng(0).normal(size=(4, 3))


def gather_and_dot(t, scale):
    """Both operations whose reverse derivatives lose float64 when they are traced with x64 off.

    As `lax.dot_general`: `jnp.dot` names its result's dtype, and vmap of its transpose takes that for float32.
    """
    inner = jax.lax.dot_general(jnp.array(MATRIX), t, (((1,), (0,)), ((), ())))
    return jnp.tanh(scale * inner) * t[INDEX] ** 2


def in_numpy(t, scale):
    return np.tanh(scale * (MATRIX @ t)) * t[INDEX] ** 2


def jacobians(t, scale):
    """By hand, with respect to t and to scale."""
    inner = MATRIX @ t
    bend = 1 - np.tanh(scale * inner) ** 2
    gathered = np.eye(3)[INDEX]
    by_t = (scale * bend * t[INDEX] ** 2)[:, None] * MATRIX
    by_t += (np.tanh(scale * inner) * 2 * t[INDEX])[:, None] * gathered
    return by_t, bend * inner * t[INDEX] ** 2


T, SCALE = np.array([0.1, 1 / 3, -0.7]), np.float64(0.9)
FUNCTION = in_float64(gather_and_dot)
COTANGENT = np.array([1.0, -2.0, 0.5, 3.0])
MODES = {"x64-on": True, "x64-off": False}


@pytest.fixture(params=MODES, autouse=True)
def mode(request):
    with jax.enable_x64(MODES[request.param]):
        yield


def digits_of(values, expected, tolerance=1e-13):
    """Compares in NumPy: with x64 off jax.numpy would round float64 before it compares."""
    np.testing.assert_allclose(np.asarray(values), expected, rtol=tolerance, atol=tolerance)


# What JAX hands to and fro at the border of a derivative is of the argument's dtype. So that the digits show, functions
# are differentiated from float64 intermediates: t = `widen(start)`, exact at these starts.
START = np.array([0.5, 0.25, -0.75], np.float32)


@in_float64
def widen(start):
    return start / 3


@in_float64
def weigh(values):
    """Turns digits that float32 would lose into ones that it shows."""
    return jnp.sum(COTANGENT * values)


def test_values_are_float64():
    for call in (lambda: FUNCTION(T, SCALE), jax.jit(lambda: FUNCTION(T, SCALE))):
        out = call()
        assert out.dtype == np.float64
        digits_of(out, in_numpy(T, SCALE))


def test_float32_arguments_are_widened_and_integers_kept():
    seen = []

    @in_float64
    def record(*args):
        seen.extend(a.dtype for a in args)
        return args[0] * 1.0

    assert (
        record(jnp.float32(1 / 3), jnp.bfloat16(1), np.arange(2, dtype=np.int32), np.array([True])).dtype == np.float64
    )
    assert seen == [np.float64, np.float64, np.int32, np.bool_]


def test_narrow_arguments_have_narrow_gradients():
    t, scale = T.astype(np.float32), np.float32(SCALE)
    gradient = jax.jit(jax.grad(lambda t: weigh(FUNCTION(t, scale)).astype(jnp.float32)))(jnp.asarray(t))
    assert gradient.dtype == jnp.float32
    digits_of(gradient, COTANGENT @ jacobians(t.astype(float), float(scale))[0], 1e-6)


def test_reverse_through_gather_and_dot_keeps_float64():
    """The derivative with respect to a float64 argument, read before anything rounds it."""
    with jax.enable_x64(True):
        t, scale, cotangent = jnp.asarray(T), jnp.asarray(SCALE), jnp.asarray(COTANGENT)
    out, pull = jax.vjp(FUNCTION, t, scale)
    by_t, by_scale = pull(cotangent)
    expected = [COTANGENT @ j for j in jacobians(T, SCALE)]
    assert out.dtype == by_t.dtype == by_scale.dtype == np.float64
    digits_of(by_t, expected[0])
    digits_of(by_scale, expected[1])


def test_forward_keeps_float64():
    with jax.enable_x64(True):
        t, scale, move = jnp.asarray(T), jnp.asarray(SCALE), jnp.asarray(COTANGENT[:3])
    tangent = jax.jvp(lambda t: FUNCTION(t, scale), (t,), (move,))[1]
    assert tangent.dtype == np.float64
    digits_of(tangent, jacobians(T, SCALE)[0] @ COTANGENT[:3])


def loss(start):
    return weigh(FUNCTION(widen(start), SCALE)).astype(jnp.float32)


def gradient_by_hand(start):
    return COTANGENT @ jacobians(np.asarray(start, float) / 3, SCALE)[0] / 3


STARTS = np.stack([START, START + 0.25, -START])


@pytest.mark.parametrize(
    "gradient",
    [
        lambda starts: np.stack([jax.grad(loss)(start) for start in starts]),
        lambda starts: np.stack([jax.jit(jax.grad(loss))(start) for start in starts]),
        jax.vmap(jax.grad(loss)),
        jax.jit(jax.vmap(jax.grad(loss))),
        jax.vmap(jax.grad(jax.jit(loss))),
        jax.vmap(jax.grad(jax.checkpoint(loss))),
        jax.vmap(jax.jacfwd(loss)),
    ],
    ids=["grad", "jit-grad", "vmap-grad", "jit-vmap-grad", "vmap-grad-jit", "remat", "forward"],
)
def test_gradients_however_they_are_taken(gradient):
    starts = jnp.asarray(STARTS)
    found = gradient(starts)
    assert found.dtype == np.float32
    digits_of(found, [gradient_by_hand(start) for start in STARTS], 1e-6)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_forward_over_reverse(wrap):
    start, move = jnp.asarray(START), jnp.asarray([1.0, -1.0, 0.5], jnp.float32)
    found = wrap(lambda s, m: jax.jvp(jax.grad(loss), (s,), (m,))[1])(start, move)
    step = 1e-5
    ahead, behind = (gradient_by_hand(START + by * np.asarray(move, float)) for by in (step, -step))
    digits_of(found, (ahead - behind) / (2 * step), 1e-5)


def test_hessian_is_symmetric():
    hessian = np.asarray(jax.jit(jax.hessian(loss))(jnp.asarray(START)))
    digits_of(hessian, hessian.T, 1e-5)


def test_only_what_moves_is_differentiated():
    """An integer and a constant beside it have no derivative, and stop nothing."""

    @in_float64
    def pick(t, index, other):
        return jnp.sum(t[index] ** 2 * other)

    start, index, other = jnp.asarray(START), np.array([0, 2]), np.array([3.0, 1.0])
    found = jax.grad(lambda s: pick(s, index, other).astype(jnp.float32))(start)
    digits_of(found, [2 * 0.5 * 3, 0, 2 * -0.75], 1e-6)


def test_the_mode_outside_is_left_as_it_was():
    before = jnp.result_type(float)
    jax.jit(jax.grad(loss))(jnp.asarray(START))
    assert jnp.result_type(float) == before
    assert (jnp.ones(3) / 3).dtype == before


def test_a_numpy_array_given_here_stays_what_it_is_elsewhere():
    shared = np.array([1 / 3, 2 / 3])
    in_float64(lambda a: a + 1)(shared)
    assert jax.jit(lambda a: a * 2)(shared).dtype == jnp.result_type(float)
