"""Codes refuse arguments that make no sense, and say which, what they were and what was expected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode import (
    BerrutCode,
    BSplineCode,
    FloaterHormannCode,
    InterpolatingCode,
    LagrangeCode,
    Plan,
    ReplicationCode,
    SplineCode,
    UncodedCode,
    interpolants,
    nodes,
)

from .cases import CODES, MOVES_ROWS, each_program, normal

each_kind = pytest.mark.parametrize("name", ["berrut-chebyshev", "spline-repeated", *MOVES_ROWS])
each_that_mixes = pytest.mark.parametrize("name", ["berrut-chebyshev", "spline-repeated", "bspline-mixed"])
each_that_moves = pytest.mark.parametrize("name", MOVES_ROWS)

UP = np.array([-1.0, 0.0, 1.0])

CONSTRUCTED = {
    "nodes-not-ascending": (lambda: SplineCode(UP[::-1], UP), "data_nodes.*ascending"),
    "data-nodes-equal": (lambda: SplineCode(np.array([0.0, 0.0, 1.0]), UP), r"data_nodes\[0:2\].*no two equal"),
    "workers-descending": (lambda: SplineCode(UP, UP[::-1]), "worker_nodes.*ascending"),
    "one-node": (lambda: SplineCode(np.array([0.0]), UP), r"data_nodes has shape \(1,\).*at least 2"),
    "matrix-of-nodes": (lambda: SplineCode(UP[:, None], UP), r"data_nodes has shape \(3, 1\)"),
    "nan-node": (lambda: SplineCode(UP, np.array([0.0, np.nan])), "worker_nodes.*finite"),
    "complex-nodes": (lambda: SplineCode(UP, UP * 1j), "worker_nodes has dtype complex128"),
    "strings": (lambda: SplineCode(["a", "b"], UP), "data_nodes"),
    "negative-smoothing": (lambda: SplineCode(UP, UP, 0.0, -1.0), r"decoder_smoothing is -1\.0.*0"),
    "infinite-smoothing": (lambda: SplineCode(UP, UP, np.inf), "encoder_smoothing is inf.*finite"),
    "nan-smoothing": (lambda: SplineCode(UP, UP, np.nan), "encoder_smoothing is nan"),
    "vector-smoothing": (lambda: SplineCode(UP, UP, np.zeros(3)), r"encoder_smoothing has shape \(3,\)"),
    "text-smoothing": (lambda: SplineCode(UP, UP, "little"), "encoder_smoothing is 'little'"),
    "one-input": (lambda: SplineCode.chebyshev(1, 5), "num_data is 1.*at least 2"),
    "half-an-input": (lambda: SplineCode.chebyshev(2.5, 5), r"num_data is 2\.5.*whole"),
    "one-worker": (lambda: BerrutCode.chebyshev(2, 1), "num_workers is 1"),
    "fewer-workers-than-data": (lambda: SplineCode.systematic(5, 4), "num_workers is 4.*5 data nodes"),
    "fewer-workers-than-data-repeated": (lambda: SplineCode.repeated(5, 4), "num_workers is 4.*5 data nodes"),
    "negative-degree": (lambda: FloaterHormannCode.chebyshev(3, 6, degree=-1), "degree is -1.*at least 0"),
    "degree-not-whole": (lambda: FloaterHormannCode.chebyshev(3, 6, degree=1.5), r"degree is 1\.5"),
    "degree-true": (lambda: FloaterHormannCode.chebyshev(3, 6, degree=True), "degree is True"),
    "lagrange-degree-zero": (lambda: LagrangeCode.chebyshev(3, 6, degree=0), "degree is 0.*at least 1"),
    "unknown-encoder": (lambda: BSplineCode.chebyshev(3, 6, encoder="spline"), "encoder is 'spline'.*an interpolant"),
    "nodes-are-no-layout": (lambda: InterpolatingCode(UP), r"nodes is array.*expected a layout"),
    "decoder-is-a-class": (
        lambda: InterpolatingCode(nodes.chebyshev(3, 6), decoder=interpolants.Berrut),
        "decoder is <class .*expected an interpolant",
    ),
    "polynomial-degree-zero": (lambda: interpolants.Polynomial(0), "degree is 0.*at least 1"),
    "too-many-between": (lambda: BerrutCode.mixed(3, 6, 4), "num_between is 4; expected at most .*, 3"),
    "replication-too-few": (lambda: ReplicationCode(5, 4), "num_workers is 4.*5"),
    "replication-not-whole": (lambda: ReplicationCode(2.0, 4), r"num_data is 2\.0"),
    "uncoded-none": (lambda: UncodedCode(0), "num_data is 0"),
}


@pytest.mark.parametrize("call", CONSTRUCTED)
def test_constructors_refuse(unchecked, call):
    construct, message = CONSTRUCTED[call]
    with pytest.raises(ValueError, match=message):
        construct()


@each_kind
def test_encode_refuses(unchecked, name):
    code = CODES[name]
    bad = {
        r"x has shape \(7, 2\).*leading axis of 5": jnp.ones((7, 2)),
        r"x\['a'\]\[1\] has shape \(\)": {"a": [jnp.ones(5), jnp.ones(())]},
    }
    for message, x in bad.items():
        with pytest.raises(ValueError, match=message):
            code.encode(x)


@each_kind
def test_decode_refuses(unchecked, name):
    code = CODES[name]
    n = code.num_workers
    y, returned = jnp.ones((n, 2)), np.ones(n, bool)
    bad = {
        rf"y has shape \({n + 1}, 2\).*leading axis of {n}": (jnp.ones((n + 1, 2)), returned),
        rf"returned has shape \({n + 1},\).*\({n},\)": (y, np.ones(n + 1, bool)),
        r"returned has shape \(\)": (y, True),
        "returned has dtype int.*expected bool": (y, np.ones(n, int)),
        "returned has dtype float": (y, np.ones(n)),
    }
    for message, arguments in bad.items():
        with pytest.raises(ValueError, match=message):
            code.decode(*arguments)


def test_masks_are_checked_under_jit(unchecked):
    with pytest.raises(ValueError, match="returned has dtype int"):
        jax.jit(CODES["berrut-chebyshev"].decode)(jnp.ones(12), np.ones(12, int))


@each_program
def test_masks_are_checked_wherever_they_go(unchecked, name):
    code = CODES[name]
    for reads_mask in (code.decoder_matrix, code.recovered, code.exact):
        with pytest.raises(ValueError, match="returned has dtype int"):
            reads_mask(np.ones(code.num_workers, int))


@each_kind
def test_the_callers_mask_is_the_callers(name):
    """Compiled programs run later than they are called, on the array itself if it is well aligned."""
    code = CODES[name]
    returned = np.arange(code.num_workers) != 1
    decoder = code.decoder_linop(returned)
    before = np.asarray(decoder.matrix())
    returned[:] = ~returned
    np.testing.assert_array_equal(decoder.matrix(), before)


# ---- dtypes ------------------------------------------------------------------------------------------------

EXACT_DTYPES = ["int8", "uint8", "int32", "uint32", "bool", "float16", "bfloat16", "float32", "complex64"]


@each_that_mixes
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint16", "uint32"])
def test_codes_that_mix_refuse_tokens_and_say_what_to_do(name, dtype):
    code = CODES[name]
    x, y = jnp.ones((code.num_data, 2), dtype), jnp.ones((code.num_workers, 2), dtype)
    returned = np.ones(code.num_workers, bool)
    for argument, call in {"x": lambda: code.encode(x), "y": lambda: code.decode(y, returned)}.items():
        with pytest.raises(ValueError, match=rf"{argument} has dtype {dtype}.*code the embeddings.*ReplicationCode"):
            call()


@each_that_mixes
@pytest.mark.parametrize("dtype", ["bool", "complex64"])
def test_codes_that_mix_refuse_what_is_no_real_number(name, dtype):
    with pytest.raises(ValueError, match=rf"x\['a'\] has dtype {dtype}.*real"):
        CODES[name].encode({"a": jnp.ones(5, dtype)})


@each_that_mixes
def test_images_of_bytes_are_coded_as_float32(name):
    code, image = CODES[name], np.random.default_rng(0).integers(0, 256, (5, 4, 4), np.uint8)
    sent = code.encode(jnp.asarray(image))
    assert sent.dtype == jnp.float32
    np.testing.assert_array_equal(sent, code.encode(jnp.asarray(image, jnp.float32)))


@each_that_moves
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
def test_codes_that_move_rows_keep_every_bit(name, dtype):
    code = CODES[name]
    x = (1000 * normal(code.num_data, 3)).astype(dtype)
    sent = code.encode(jnp.asarray(x))
    results = code.decode(sent, np.ones(code.num_workers, bool))
    assert sent.dtype == results.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(results, x)


@each_that_moves
def test_integers_that_float32_does_not_hold_pass_through(name):
    code = CODES[name]
    x = 2**24 + 1 + np.arange(code.num_data, dtype=np.int32)
    np.testing.assert_array_equal(code.decode(code.encode(x), np.ones(code.num_workers, bool)), x)


@pytest.mark.parametrize(
    ("dtype", "lost"),
    [("int32", -(2**31)), ("uint8", 255), ("bool", False), ("float16", np.nan), ("complex64", complex(np.nan, 0))],
)
def test_lost_inputs_are_marked_as_documented(dtype, lost):
    returned = np.arange(5) != 2
    results = np.asarray(UncodedCode(5).decode(jnp.ones((5, 2), dtype), returned))
    np.testing.assert_array_equal(results[returned], np.ones((4, 2), dtype))
    np.testing.assert_array_equal(results[~returned], np.full((1, 2), lost, dtype))


# ---- plans -------------------------------------------------------------------------------------------------

PLANS = {
    "short": (lambda: Plan(assignment=np.zeros(11, int)), r"plan\.assignment has shape \(11,\).*\(12,\)"),
    "real": (
        lambda: Plan(assignment=np.zeros(12)),
        r"plan\.assignment has .*dtype float64; expected the number",
    ),
    "beyond": (lambda: Plan(assignment=np.full(12, 5)), r"plan\.assignment is \[5 .*from 0 to 4"),
    "negative": (lambda: Plan(assignment=np.arange(12) - 1), r"plan\.assignment is .*from 0 to 4"),
}


@pytest.mark.parametrize("case", PLANS)
def test_replication_refuses_assignments(unchecked, case):
    make, message = PLANS[case]
    plan = make()
    for call in (
        lambda: CODES["replication"].encode(jnp.ones(5), plan),
        lambda: CODES["replication"].decode(jnp.ones(12), np.ones(12, bool), plan),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@each_that_mixes
def test_codes_that_assign_nothing_refuse_assignments(name):
    plan = Plan(assignment=np.zeros(12, int))
    for call in (
        lambda: CODES[name].encode(jnp.ones(5), plan),
        lambda: CODES[name].decode(jnp.ones(12), np.ones(12, bool), plan),
    ):
        with pytest.raises(ValueError, match=r"plan\.assignment is given.*ReplicationCode"):
            call()
