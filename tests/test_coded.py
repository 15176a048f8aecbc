import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from scipy.interpolate import CubicSpline

import jaxcode as jc
from jaxcode import BerrutCode, ReplicationCode, SplineCode, UncodedCode, coded, linops

from .codes.nearest_code import NearestCode

K, N = 5, 12
SPLINE = SplineCode.systematic(K, N, decoder_smoothing=1e-3)
CODES = {
    "spline": SPLINE,
    "berrut": BerrutCode.chebyshev(K, N),
    "replication": ReplicationCode(K, N),
    "uncoded": UncodedCode(K),
    "outside": NearestCode(K, N),
}
each_code = pytest.mark.parametrize("name", CODES)


def mask(code, lost=(1, 6, 7)):
    return ~np.isin(np.arange(code.num_workers), lost)


def normal(*shape, dtype=np.float32):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def curve(x):
    return jnp.sin(2 * x) + jnp.sum(x, axis=-1, keepdims=True)


# ---- what it computes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, K - 1, K, K + 1, 3 * K + 2])
@pytest.mark.parametrize("name", ["spline", "replication"])
def test_decodes_each_group_of_neighbours(name, size):
    code, x = CODES[name], normal(size, 2)
    returned = mask(code)
    filled = np.concatenate([x, np.repeat(x[-1:], -size % K, axis=0)])
    groups = [
        code.decode(curve(code.encode(jnp.asarray(rows))), returned) for rows in np.split(filled, len(filled) // K)
    ]
    found = coded(curve, code)(jnp.asarray(x), returned)
    assert found.shape == (size, 2)
    np.testing.assert_allclose(found, np.concatenate(groups)[:size], rtol=1e-4, atol=1e-4)


def test_pytrees_in_and_out():
    x = {"image": jnp.asarray(normal(7, 2, 3)), "length": jnp.asarray(normal(7))}

    def f(batch):
        return batch["image"][..., 0] * 2, {"sum": batch["length"] + 1, "wide": batch["image"][:, None]}

    found = coded(f, SPLINE)(x, mask(SPLINE))
    alone = coded(lambda image: 2 * image[..., 0], SPLINE)(x["image"], mask(SPLINE))
    assert jax.tree.map(jnp.shape, found) == ((7, 2), {"sum": (7,), "wide": (7, 1, 2, 3)})
    np.testing.assert_allclose(found[0], alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[1]["sum"], coded(lambda v: v + 1, SPLINE)(x["length"], mask(SPLINE)), atol=1e-5)


@pytest.mark.parametrize("name", ["replication", "uncoded"])
def test_replication_with_every_answer_is_exact(name):
    x = jnp.asarray(normal(13, 2))
    np.testing.assert_array_equal(coded(lambda x: 2 * x, CODES[name])(x), 2 * x)


@each_code
def test_returned_left_out_means_all_workers(name):
    predict, x = coded(curve, CODES[name]), jnp.asarray(normal(6, 2))
    np.testing.assert_array_equal(predict(x), predict(x, np.ones(CODES[name].num_workers, bool)))
    np.testing.assert_array_equal(predict(x), predict(x, None))


@pytest.mark.parametrize(
    ("name", "present", "recovered"),
    [
        ("spline", [], []),
        ("spline", [4], []),
        ("spline", [4, 5], [0, 1, 2, 3, 4]),
        ("berrut", [4], []),
        ("replication", [1, 6, 3], [1, 3]),
        ("uncoded", [0], [0]),
        ("outside", [0], [0, 1, 2, 3, 4]),
        ("outside", [], []),
    ],
)
def test_inputs_that_cannot_be_recovered_are_nan(name, present, recovered):
    code = CODES[name]
    found = coded(curve, code)(jnp.asarray(normal(2 * K, 2)), np.isin(np.arange(code.num_workers), present))
    lost = ~np.isin(np.arange(2 * K) % K, recovered)
    np.testing.assert_array_equal(np.isnan(found), np.broadcast_to(lost[:, None], (2 * K, 2)))


def test_dtypes_are_kept():
    x = {dtype: jnp.asarray(normal(6, 2), dtype) for dtype in ("float32", "bfloat16", "float16")}
    found = coded(lambda x: jax.tree.map(lambda leaf: 2 * leaf, x), SPLINE)(x, mask(SPLINE))
    assert all(found[dtype].dtype == dtype for dtype in x)
    expected = np.asarray(found["float32"])
    for dtype in ("bfloat16", "float16"):
        error = np.abs(np.asarray(found[dtype], np.float32) - expected).max()
        assert error <= 32 * float(jnp.finfo(dtype).eps) * np.abs(expected).max()


def test_many_nodes_keep_their_digits_in_any_mode():
    """A hundred inputs and four thousand workers: ends closer than float32 tells apart."""
    code = SplineCode.chebyshev(100, 4000)
    returned = np.random.default_rng(1).random(4000) > 0.3
    encoder = CubicSpline(code.nodes.data, np.eye(100), bc_type="natural")
    inside = np.clip(code.nodes.workers, code.nodes.data[0], code.nodes.data[-1])
    expected = encoder(inside) + encoder(inside, 1) * (code.nodes.workers - inside)[:, None]
    np.testing.assert_allclose(np.asarray(code.encoder_matrix()), expected, rtol=0, atol=1e-5)
    at = np.flatnonzero(returned)[[0, 700, -1]]
    column = CubicSpline(code.nodes.workers[returned], np.eye(4000)[returned][:, at], bc_type="natural")
    matrix = np.asarray(code.decoder_matrix(returned))
    np.testing.assert_allclose(matrix[:, at], column(code.nodes.data), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["replication", "uncoded", "outside"])
def test_tokens_and_classes_pass_where_nothing_is_mixed(name):
    embed = nnx.Embed(30, 3, rngs=nnx.Rngs(0))
    tokens = jnp.arange(14, dtype=jnp.int32).reshape(7, 2)
    np.testing.assert_array_equal(coded(embed, CODES[name])(tokens), embed(tokens))
    large = 2**24 + 1 + tokens
    found = coded(lambda x: {"same": x, "even": x % 2 == 0}, CODES[name])(large)
    np.testing.assert_array_equal(found["same"], large)
    np.testing.assert_array_equal(found["even"], large % 2 == 0)


def test_an_input_that_is_nan_spoils_its_group_where_inputs_are_mixed():
    x = jnp.asarray(normal(2 * K, 2)).at[K + 1].set(jnp.nan)
    spoilt = {name: np.isnan(coded(curve, code)(x)).any(axis=1) for name, code in CODES.items()}
    for name in ("spline", "berrut"):
        np.testing.assert_array_equal(spoilt[name], np.arange(2 * K) >= K)
    for name in ("replication", "uncoded", "outside"):
        np.testing.assert_array_equal(spoilt[name], np.arange(2 * K) == K + 1)


def test_inputs_of_a_numpy_batch_that_are_not_finite_are_named_where_they_are_mixed():
    x = normal(2 * K, 2)
    x[K + 1, 0], x[0] = np.nan, np.inf
    with pytest.warns(RuntimeWarning, match=rf"x has a NaN or an infinite number in inputs 0, {K + 1} of {2 * K}"):
        coded(curve, SPLINE)(x)
    with pytest.warns(RuntimeWarning, match=f"inputs 0 of {K}"):
        SPLINE.encode({"a": x[:K], "b": np.full(K, 3e38, np.float32)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("replication", "uncoded", "outside"):
            coded(curve, CODES[name])(x)
            CODES[name].encode(x[:K])
        coded(curve, SPLINE)(np.full((K, 2), 3e38, np.float32))
        coded(curve, SPLINE)(jnp.asarray(x))


# ---- transformations ---------------------------------------------------------------------------------------


def test_new_masks_and_inputs_do_not_retrace():
    traces = []

    def f(x):
        traces.append(None)
        return 2 * x

    predict = coded(f, SPLINE)
    for lost in range(N):
        predict(jnp.asarray(normal(6, 2)) + lost, mask(SPLINE, [lost]))
        predict(jnp.asarray(normal(6, 2)), jnp.asarray(mask(SPLINE, [lost])))
    assert len(traces) == 1
    predict(jnp.asarray(normal(7, 2)), mask(SPLINE))  # two groups, as before, of another batch
    assert len(traces) == 2


@pytest.mark.parametrize(
    "code",
    [SPLINE, SplineCode.chebyshev(100, 300), BerrutCode.chebyshev(K, N)],
    ids=["matrix", "blocks", "compiled"],
)
def test_a_known_mask_may_come_first_inside_or_outside_of_jit(code):
    """What was prepared for a mask is kept, and must not be bound to the program that was being traced then."""
    predict, x, returned = coded(curve, code), jnp.asarray(normal(6, 2)), mask(code)
    inside = jax.jit(lambda x: predict(x, returned))(x)
    np.testing.assert_allclose(predict(x, returned), inside, rtol=1e-5, atol=1e-5)
    made_inside = []
    jax.jit(lambda x: made_inside.append(coded(curve, code)) or x)(x)
    np.testing.assert_allclose(made_inside[0](x, returned), inside, rtol=1e-5, atol=1e-5)


@jc.pytree("num_data", "num_workers")
class Converted(jc.AbstractCode):
    """A code whose operators go through JAX and back to NumPy."""

    num_data: int = K
    num_workers: int = N
    nodes = None
    predicts_error = False

    def encoder_linop(self, plan=None):
        return SPLINE.encoder_linop()

    def decoder_linop(self, returned, plan=None):
        doubled = np.asarray(2 * jnp.asarray(SPLINE.decoder_matrix(returned)), np.float64)
        return linops.Dense(linops.split(doubled))

    def recovered(self, returned, plan=None):
        return SPLINE.recovered(returned)

    def exact(self, returned, plan=None):
        return SPLINE.exact(returned)


def test_a_code_may_convert_what_the_host_knows():
    x, returned = jnp.asarray(normal(6, 2)), mask(SPLINE)
    predict = coded(curve, Converted())
    inside = jax.jit(lambda x: predict(x, returned))(x)
    np.testing.assert_allclose(inside, 2 * coded(curve, SPLINE)(x, returned), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(predict(x, returned), inside, rtol=1e-5, atol=1e-5)


def test_one_predict_serves_both_precisions():
    predict, x, returned = coded(curve, SPLINE), normal(6, 2, dtype=float), mask(SPLINE)
    single = predict(jnp.asarray(x, jnp.float32), returned)
    with jax.enable_x64(True):
        double = np.asarray(predict(jnp.asarray(x), returned))
        again = np.asarray(coded(curve, SPLINE)(jnp.asarray(x), returned))
    assert double.dtype == np.float64
    np.testing.assert_allclose(double, again, rtol=1e-13, atol=1e-13)
    np.testing.assert_array_equal(predict(jnp.asarray(x, jnp.float32), returned), single)


@pytest.mark.parametrize("name", ["spline", "replication", "outside"])
def test_jit_vmap_and_remat_compute_the_same(name):
    code, predict = CODES[name], coded(curve, CODES[name])
    x = jnp.asarray(normal(3, 6, 2))
    masks = np.stack([mask(code, [i]) for i in range(3)])
    expected = np.stack([predict(rows, returned) for rows, returned in zip(x, masks, strict=True)])
    np.testing.assert_allclose(jax.jit(predict)(x[0], masks[0]), expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(predict)(x, masks), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.checkpoint(predict)(x[0], masks[0]), expected[0], rtol=1e-5, atol=1e-5)
    several = jax.jit(jax.vmap(predict, (None, 0)))(x[0], masks)
    np.testing.assert_allclose(several[2], predict(x[0], masks[2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["spline", "replication", "outside"])
def test_jacobians_and_gradients_agree(name):
    code = CODES[name]
    x, returned = jnp.asarray(normal(6, 2)), jnp.asarray(mask(code))

    def predict(x):
        return jnp.where(jnp.isnan(out := coded(curve, code)(x, returned)), 0, out)

    forward, backward, again = jax.jit(
        lambda x: (jax.jacfwd(predict)(x), jax.jacrev(predict)(x), jax.jacrev(jax.checkpoint(predict))(x))
    )(x)
    assert forward.shape == (6, 2, 6, 2)
    np.testing.assert_allclose(backward, forward, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(again, backward, rtol=1e-5, atol=1e-5)
    gradient = jax.vmap(jax.grad(jax.jit(lambda x: jnp.sum(predict(x) ** 2))))(x[None])[0]
    np.testing.assert_allclose(gradient, 2 * np.einsum("bi,bicj->cj", predict(x), backward), rtol=1e-3, atol=1e-3)


def test_garbage_of_missing_workers_moves_no_gradient():
    """Worker 3 computes NaN and has not returned."""
    returned = jnp.asarray(mask(SPLINE, [3]))

    def loss(bias):
        spoil = jnp.where(jnp.arange(N)[:, None] == 3, jnp.nan, 1)
        return jnp.sum(SPLINE.decode(spoil * (SPLINE.encode(jnp.asarray(normal(K, 2))) + bias), returned))

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.zeros((N, 2)))
    assert np.isfinite(value)
    assert np.isfinite(np.delete(gradient, 3, axis=0)).all()


def loss(code, parameters, x, returned):
    out = coded(lambda x: jnp.tanh(x @ parameters["w"]) + parameters["b"], code)(x, returned)
    return jnp.sum(jnp.sin(jnp.arange(out.size)).reshape(out.shape) * out)


def test_every_gradient_is_a_finite_difference():
    """With respect to nodes and smoothing (the code), what f closes over, and the inputs; 7 inputs make two groups."""
    parameters = {"w": normal(2, 3, dtype=float), "b": normal(3, dtype=float)}
    code = SplineCode.chebyshev(K, N, encoder_smoothing=1e-3, decoder_smoothing=1e-2)
    at = (code, parameters, normal(7, 2, dtype=float))
    returned = mask(at[0])
    value = jax.jit(loss)
    with jax.enable_x64(True):
        gradient = jax.tree.map(np.asarray, jax.jit(jax.grad(loss, (0, 1, 2)))(*at, returned))
        leaves, structure = jax.tree.flatten(at)
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(at)]
        for i, (path, slope) in enumerate(zip(paths, jax.tree.leaves(gradient), strict=True)):
            move = np.cos(np.arange(np.size(leaves[i]))).reshape(np.shape(leaves[i]))

            def moved(by, i=i, move=move):
                changed = [*leaves[:i], leaves[i] + by * move, *leaves[i + 1 :]]
                return float(value(*jax.tree.unflatten(structure, changed), returned))

            step = 1e-5
            difference = (moved(-2 * step) - 8 * moved(-step) + 8 * moved(step) - moved(2 * step)) / (12 * step)
            np.testing.assert_allclose(np.sum(slope * move), difference, rtol=1e-6, atol=1e-6, err_msg=path)


# ---- bad arguments -----------------------------------------------------------------------------------------


class Dense(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(2)(x)


X = jnp.ones((6, 2))
REFUSED = {
    "code-is-not-one": (lambda: coded(curve, (K, N)), r"code is \(5, 12\); expected a code such as SplineCode"),
    "code-is-a-constructor": (lambda: coded(curve, SplineCode), "code is <constructor SplineCode>; expected a code"),
    "f-is-a-class": (lambda: coded(Dense, SPLINE), "f is <class .*not its class"),
    "f-is-a-number": (lambda: coded(2.0, SPLINE), r"f is 2\.0; expected a callable"),
    "linen-without-variables": (lambda: coded(Dense(), SPLINE), "Dense without variables; expected the pair"),
    "short-mask": (lambda: coded(curve, SPLINE)(X, np.ones(N - 1, bool)), r"returned has shape \(11,\).*\(12,\)"),
    "scalar-mask": (lambda: coded(curve, SPLINE)(X, True), r"returned has shape \(\)"),
    "integer-mask": (lambda: coded(curve, SPLINE)(X, np.ones(N, int)), "returned has dtype int.*expected bool"),
    "indices": (lambda: coded(curve, SPLINE)(X, [0, 1, 2]), r"returned has shape \(3,\)"),
    "random-key": (lambda: coded(curve, SPLINE)(X, jax.random.key(0)), r"returned has shape \(\)"),
    "ragged": (lambda: coded(curve, SPLINE)(X, [[True], True]), r"returned is \[\[True\], True\]; expected bool"),
    "no-inputs": (lambda: coded(curve, SPLINE)({}), r"x is \{\}; expected at least one array"),
    "empty-batch": (lambda: coded(curve, SPLINE)(X[:0]), r"x has leaves of shapes \[\(0, 2\)\].*at least 1"),
    "scalar-leaf": (lambda: coded(curve, SPLINE)((X, 1.0)), r"\[\(6, 2\), \(\)\].*leading axis"),
    "batches-differ": (lambda: coded(curve, SPLINE)((X, X[:5])), r"\[\(6, 2\), \(5, 2\)\].*same length"),
    "complex-inputs": (lambda: coded(curve, SPLINE)(X.astype(jnp.complex64)), "x has dtype complex64.*real"),
    "f-drops-the-batch": (lambda: coded(jnp.sum, SPLINE)(X), r"f's result has shape \(\) for a batch of 24"),
    "f-moves-the-batch": (
        lambda: coded(lambda x: {"out": jnp.ones((3, 2))}, SPLINE)(X),
        r"f's result\['out'\] has shape \(3, 2\) for a batch of 24; expected the batch as its leading axis",
    ),
    "f-returns-classes": (
        lambda: coded(lambda x: jnp.argmax(x, -1), SPLINE)(X),
        "f's result has dtype int.*mixes|f's result has dtype int.*logits",
    ),
    "tokens": (lambda: coded(curve, SPLINE)(jnp.ones((6, 2), int)), "x has dtype int32.*code the embeddings"),
    "f-returns-complex": (lambda: coded(lambda x: x + 1j, SPLINE)(X), "f's result has dtype complex.*real"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(unchecked, case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_refuses_the_same_under_jit(unchecked):
    with pytest.raises(ValueError, match="returned has dtype int"):
        jax.jit(functools.partial(coded(curve, SPLINE), X))(np.ones(N, int))
