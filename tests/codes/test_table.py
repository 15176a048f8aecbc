"""Codes x node layouts x masks: values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .cases import (
    CODES,
    DECODES_LINES,
    ENCODES_LINES,
    INTERPOLATING,
    MASKS,
    MERGES_SITES,
    all_masks,
    assert_near,
    decoder_matrix,
    each_code,
    each_mask,
    each_program,
    encoder_matrix,
    in_x64,
    normal,
    returned_of,
    sites,
)

# Whole chains of terms, in float32: nine roundings of the largest.
SINGLE = 5.5


@functools.cache
def compiled(name):
    """Encode and decode as users compile them, the code a constant, data and mask arguments; and what was traced."""
    code, traces = CODES[name], []

    def decode(y, returned):
        traces.append(y.shape)
        return code.decode(y, returned)

    return jax.jit(code.encode), jax.jit(decode), traces


@in_x64
def encode(code, x):
    return code.encode(x)


@in_x64
def decode(code, y, returned):
    return code.decode(y, returned)


@jax.jit
def decode_as_argument(code, y, returned):
    return code.decode(y, returned)


def terms(matrix, rows):
    return np.abs(np.nan_to_num(matrix)) @ np.abs(rows.reshape(len(rows), -1))


# ---- values ------------------------------------------------------------------------------------------------


@each_code
def test_encodes_as_its_matrix_says(name):
    code, x = CODES[name], normal(CODES[name].num_data, 3)
    matrix = encoder_matrix(code)
    assert matrix.shape == (code.num_workers, code.num_data)
    coded = encode(code, x)
    assert coded.dtype == jnp.float32
    assert_near(coded, matrix @ x, terms(matrix, x), SINGLE)


@each_code
@each_mask
def test_decodes_as_its_matrix_says(name, mask):
    code, returned = CODES[name], returned_of(mask, name)
    y = normal(code.num_workers, 3)
    matrix = decoder_matrix(code, returned)
    assert matrix.shape == (code.num_data, code.num_workers)
    decoded = decode(code, y, returned)
    assert decoded.dtype == jnp.float32
    assert_near(decoded, matrix @ y, terms(matrix, y), SINGLE)


@each_code
@each_mask
def test_matrix_reads_only_who_returned(name, mask):
    code, returned = CODES[name], returned_of(mask, name)
    recovered = np.asarray(code.recovered(returned))
    matrix = decoder_matrix(code, returned)
    assert np.isnan(matrix[~recovered]).all()
    assert np.isfinite(matrix[recovered]).all()
    assert (matrix[recovered][:, ~returned] == 0).all()
    np.testing.assert_allclose(matrix[recovered].sum(axis=1), 1, atol=1e-9)


@pytest.mark.parametrize("name", INTERPOLATING)
@each_mask
def test_two_answers_recover_everything(name, mask):
    assert np.asarray(CODES[name].recovered(returned_of(mask, name))).all()


@each_mask
def test_replication_recovers_what_some_copy_returned(mask):
    returned = returned_of(mask, "replication")
    expected = [returned[k :: CODES["replication"].num_data].any() for k in range(CODES["replication"].num_data)]
    np.testing.assert_array_equal(CODES["replication"].recovered(returned), expected)


@each_mask
def test_replication_takes_the_first_copy_and_uncoded_the_only_one(mask):
    for name in ("replication", "uncoded"):
        code, returned = CODES[name], returned_of(mask, name)
        y = normal(code.num_workers, 3)
        rows = [np.flatnonzero(returned & (np.arange(code.num_workers) % code.num_data == k)) for k in range(5)]
        expected = np.stack([y[row[0]] if row.size else np.full(3, np.nan) for row in rows])
        np.testing.assert_array_equal(decode(code, y, returned), expected)


@pytest.mark.parametrize("name", INTERPOLATING)
@pytest.mark.parametrize("present", [[], [0], [7]], ids=["none", "first", "inner"])
def test_fewer_than_two_answers_are_nan(name, present):
    code = CODES[name]
    returned = np.isin(np.arange(code.num_workers), present)
    assert not np.asarray(code.recovered(returned)).any()
    assert np.isnan(decode(code, normal(code.num_workers, 3), returned)).all()
    assert np.isnan(decoder_matrix(code, returned)).all()


@pytest.mark.parametrize("name", [name for name in MERGES_SITES if name.endswith("-repeated")])
def test_two_answers_at_one_node_are_their_mean(name):
    code = CODES[name]
    assert code.nodes.workers[0] == code.nodes.workers[1] < code.nodes.workers[-1]
    y = normal(code.num_workers, 3)
    decoded = decode(code, y, np.arange(code.num_workers) < 2)
    np.testing.assert_allclose(decoded, np.broadcast_to(y[:2].mean(axis=0), (code.num_data, 3)), rtol=1e-5)


# ---- properties --------------------------------------------------------------------------------------------


@each_code
@each_mask
def test_what_did_not_return_is_not_read(name, mask):
    code, returned = CODES[name], returned_of(mask, name)
    y = normal(code.num_workers, 3)
    for garbage in (np.nan, np.inf, -3e38):
        spoilt = np.where(returned[:, None], y, np.float32(garbage))
        np.testing.assert_array_equal(decode(code, spoilt, returned), decode(code, y, returned))


@each_code
@each_mask
def test_constants_are_reproduced(name, mask):
    code, returned = CODES[name], returned_of(mask, name)
    coded = encode(code, np.full((code.num_data, 3), 3, np.float32))
    np.testing.assert_allclose(coded, 3, rtol=1e-5)
    matrix = decoder_matrix(code, returned)
    decoded = decode(code, np.full((code.num_workers, 3), 3, np.float32), returned)
    recovered = np.asarray(code.recovered(returned))
    assert_near(decoded[recovered], np.full_like(decoded[recovered], 3), 3 * np.nan_to_num(matrix), SINGLE)


@pytest.mark.parametrize("name", ENCODES_LINES)
def test_straight_lines_are_encoded(name):
    code = CODES[name]
    coded = encoder_matrix(code) @ (2 - 3 * code.nodes.data)
    np.testing.assert_allclose(coded, 2 - 3 * code.nodes.workers, atol=1e-9)


@pytest.mark.parametrize("name", DECODES_LINES)
@each_mask
def test_straight_lines_are_decoded(name, mask):
    code, returned = CODES[name], returned_of(mask, name)
    if sites(code, returned) < 2:
        return  # the curve through a single node is constant
    decoded = decoder_matrix(code, returned) @ (2 - 3 * code.nodes.workers)
    np.testing.assert_allclose(decoded, 2 - 3 * code.nodes.data, atol=1e-9)


@pytest.mark.parametrize("name", MERGES_SITES)
@each_mask
def test_workers_at_one_node_may_be_exchanged(name, mask):
    code, returned = CODES[name], returned_of(mask, name)
    y = normal(code.num_workers, 3)
    shuffled = np.lexsort([np.random.default_rng(5).permutation(code.num_workers), code.nodes.workers])
    assert (shuffled != np.arange(code.num_workers)).any()
    exchanged = decode(code, y[shuffled], returned[shuffled])
    np.testing.assert_allclose(exchanged, decode(code, y, returned), rtol=1e-5, atol=1e-5)


# ---- transformations ---------------------------------------------------------------------------------------


@each_program
@each_mask
def test_closed_over_in_this_mode_is_as_accurate(name, mask):
    """With x64 off too, a code that is closed over keeps the digits of its nodes."""
    code, returned = CODES[name], returned_of(mask, name)
    x, y = normal(code.num_data, 3), normal(code.num_workers, 3)
    closed_over = compiled(name)
    assert_near(closed_over[0](x), encode(code, x), terms(encoder_matrix(code), x), SINGLE)
    assert_near(
        closed_over[1](y, returned), decode(code, y, returned), terms(decoder_matrix(code, returned), y), SINGLE
    )


@each_program
def test_argument_in_this_mode(name):
    """As an argument with x64 off, nodes are rounded to float32: the answers move by as much, not more."""
    code, returned = CODES[name], returned_of("both-ends-missing", name)
    y = normal(code.num_workers, 3)
    as_argument = decode_as_argument(code, y, returned)
    np.testing.assert_allclose(as_argument, decode(code, y, returned), rtol=1e-4, atol=1e-4)


@each_program
def test_eager_equals_jit(name):
    code, returned = CODES[name], returned_of("random-third-missing", name)
    x, y = normal(code.num_data, 3), normal(code.num_workers, 3)
    np.testing.assert_allclose(code.encode(jnp.asarray(x)), encode(code, x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(code.decode(jnp.asarray(y), returned), decode(code, y, returned), rtol=1e-5, atol=1e-5)


@in_x64
def decode_under_each_mask(code, y, masks):
    return jax.vmap(code.decode, (None, 0))(y, masks)


@in_x64
def decode_each_row(code, rows, returned):
    return jax.vmap(code.decode, (0, None))(rows, returned)


@in_x64
def decode_with_each_code(codes, y, returned):
    return jax.vmap(lambda code: code.decode(y, returned))(codes)


@each_code
def test_vmap_over_masks(name):
    y = normal(CODES[name].num_workers, 3, dtype=np.float64)
    together = decode_under_each_mask(CODES[name], y, all_masks(name))
    for mask, batched in zip(MASKS, together, strict=True):
        one = decode(CODES[name], y, returned_of(mask, name))
        assert_near(batched, one, one, 9)


@each_code
def test_vmap_over_data(name):
    rows, returned = normal(4, CODES[name].num_workers, 3, dtype=np.float64), returned_of("alternating", name)
    together = decode_each_row(CODES[name], rows, returned)
    one_by_one = np.stack([decode(CODES[name], row, returned) for row in rows])
    assert_near(together, one_by_one, one_by_one, 9)


def test_vmap_over_codes():
    names = [name for name in CODES if name.startswith("spline") and name != "spline-then-berrut"]
    codes = jax.tree.map(lambda *leaves: np.stack(leaves), *(CODES[name] for name in names))
    y, returned = normal(12, 3, dtype=np.float64), returned_of("alternating", names[0])
    together = decode_with_each_code(codes, y, returned)
    np.testing.assert_allclose(together, [decode(CODES[name], y, returned) for name in names], atol=1e-10)


@each_code
def test_every_dtype_and_shape_of_a_tree(name):
    code, returned = CODES[name], returned_of("random-third-missing", name)
    matrix = decoder_matrix(code, returned)
    shapes = {"float64": (2, 3), "float32": (3,), "bfloat16": (), "float16": (1, 2)}
    y = {dtype: normal(code.num_workers, *shape).astype(jnp.dtype(dtype)) for dtype, shape in shapes.items()}
    decoded = decode(code, y, returned)
    for dtype, shape in shapes.items():
        rows = y[dtype].astype(np.float64).reshape(code.num_workers, -1)
        assert decoded[dtype].dtype == jnp.dtype(dtype)
        assert decoded[dtype].shape == (code.num_data, *shape)
        precision = -np.log10(8 * float(jnp.finfo(dtype).eps))
        flat = decoded[dtype].astype(np.float64).reshape(code.num_data, -1)
        assert_near(flat, matrix @ rows, terms(matrix, rows), min(precision, 10))


@each_program
def test_another_leaf_changes_nothing(name):
    code, returned = CODES[name], returned_of("random-third-missing", name)
    y = normal(code.num_workers, 3)
    alone = decode(code, y, returned)
    accompanied = decode(code, {"y": y, "wide": normal(code.num_workers, 7, seed=1) * 1e6}, returned)["y"]
    np.testing.assert_allclose(accompanied, alone, rtol=1e-6, atol=1e-6)


@each_program
def test_new_masks_do_not_retrace(name):
    _, decode, traces = compiled(name)
    for mask in MASKS:
        decode(normal(CODES[name].num_workers, 3), returned_of(mask, name))
        decode(jnp.asarray(normal(CODES[name].num_workers, 3)), jnp.asarray(returned_of(mask, name)))
    assert len(traces) == 1
