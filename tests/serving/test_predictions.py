"""Tests what a server predicts: results, errors, exactness, and for inputs not finite, integers and precisions."""

import asyncio
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcode import (
    BerrutCode,
    CodedServer,
    ReplicationCode,
    SplineCode,
    coded,
    ordering,
    outputs,
    pools,
    robust,
    stop,
)

from .servers import CODE, X, assert_close, f, make_server


def pad_groups(x, num_data):
    """Pads a batch with its last input to whole groups."""
    return np.concatenate([x, np.repeat(x[-1:], -len(x) % num_data, axis=0)])


@pytest.mark.parametrize("size", [1, 5, 13, 17])
@pytest.mark.parametrize(
    "code", [CODE, ReplicationCode(4, 12), BerrutCode.chebyshev(3, 12)], ids=["spline", "copies", "Berrut"]
)
def test_results_are_those_of_coded_for_the_same_workers(pool, faults, code, size):
    faults.block(2, 7)
    prediction = make_server(pool, stop.answers(10), code)(X[:size])
    assert np.sum(~prediction.returned) == 2
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(prediction.values))
    assert_close(prediction.values, coded(f, code)(jnp.asarray(X[:size]), prediction.returned))


@pytest.mark.parametrize("size", [1, 13, 20])
def test_an_order_is_applied_to_the_inputs_without_their_padding(pool, faults, size):
    x = np.concatenate([X, X[:3] + 1])[:size]

    def by_first_number(x, num_data):
        return jnp.argsort(-x[:, 0])

    faults.block(2, 7)
    prediction = make_server(pool, stop.answers(10), order=by_first_number)(x)
    assert_close(prediction.values, coded(f, CODE, order=by_first_number)(jnp.asarray(x), prediction.returned))


def test_greedy_ordering_of_whole_groups_is_that_of_coded(pool, faults):
    faults.block(2, 7)
    x = pad_groups(X, 5)
    prediction = make_server(pool, stop.answers(10), order=ordering.greedy)(x)
    assert_close(prediction.values, coded(f, CODE, order=ordering.greedy)(jnp.asarray(x), prediction.returned))


def test_output_spaces_and_defences_are_those_of_coded(faults):
    def classify(x):
        return jax.nn.softmax(x @ jnp.eye(4))

    faults.replace(4, lambda compute, batch: 1 - compute(batch))
    x = np.tile(X, (5, 1))[:80]
    options = {"output": outputs.logits, "defence": robust.leave_one_out, "order": ordering.greedy}
    with pools.ThreadPool(classify, 12, interceptor=faults) as pool:
        prediction = make_server(pool, stop.answers(12), **options)(x)
    flagged = np.asarray(prediction.detection.flagged)
    assert flagged.sum() == 1
    assert not prediction.returned[flagged].any()
    predict = coded(classify, CODE, order=ordering.greedy, output=outputs.logits)
    assert_close(prediction.values, predict(jnp.asarray(x), prediction.returned))


@pytest.mark.parametrize(("num_groups", "num_examined"), [(1, 1), (3, 2), (4, 4), (5, 4)])
def test_groups_that_repeat_others_are_no_evidence_for_the_defence(pool, faults, num_groups, num_examined):
    sizes = []

    def record(code, answers, returned):
        sizes.append({leaf.shape[1] for leaf in jax.tree.leaves(answers)})
        return robust.only_finite(code, answers, returned)

    make_server(pool, stop.answers(12), defence=record)(np.ones((5 * num_groups, 4), np.float32))
    assert sizes == [{num_examined}]


def test_predicted_errors_are_those_of_the_code_in_the_order_of_the_batch(pool, faults):
    faults.block(1, 5, 6)
    x = pad_groups(X, 5)
    prediction = CodedServer(CODE, pool, stop.answers(9), order=ordering.greedy)(x)
    permutation = np.asarray(ordering.greedy(jnp.asarray(x), 5))
    groups = x[permutation].reshape(4, 5, 4)
    answers = [f(CODE.encode(jnp.asarray(group))) for group in groups]
    stacked = jax.tree.map(lambda *leaves: jnp.stack([leaf.reshape(12, -1) for leaf in leaves], axis=1), *answers)
    _, errors = CODE.decode_with_error(stacked, prediction.returned)
    squares = np.concatenate([np.asarray(leaf) ** 2 for leaf in jax.tree.leaves(errors)], axis=-1)
    expected = np.empty(20)
    expected[permutation] = np.sqrt(squares.mean(-1)).T.reshape(-1)
    np.testing.assert_allclose(prediction.error, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "code", [CODE, ReplicationCode(5, 12), SplineCode.chebyshev(5, 12)], ids=["systematic", "copies", "Chebyshev"]
)
@pytest.mark.parametrize("order", [None, ordering.greedy], ids=["as it is", "ordered"])
def test_exact_results_are_those_of_inputs_that_were_computed(pool, faults, code, order):
    faults.block(0, 1, 2)
    prediction = make_server(pool, stop.answers(9), code, order=order, predict_error=None)(X)
    by_member = np.asarray(code.exact(prediction.returned))
    if order is None:
        np.testing.assert_array_equal(prediction.exact, by_member[np.arange(17) % 5])
    assert prediction.exact.sum() >= by_member.sum() * 2
    truth = f(jnp.asarray(X[prediction.exact]))
    assert_close(jax.tree.map(lambda leaf: leaf[prediction.exact], prediction.values), truth)
    if code.predicts_error:
        assert (prediction.error[prediction.exact] == 0).all()


def test_the_arrays_of_a_prediction_are_read_only(pool, faults):
    x = X.copy()
    x[3] = np.nan
    for batch in (X, x, X[:5]):
        prediction = CodedServer(CODE, pool, stop.answers(12))(batch)
        arrays = [*jax.tree.leaves(prediction.values), prediction.error, prediction.exact, prediction.returned]
        for array in arrays:
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0


def test_a_code_may_be_for_more_workers_than_there_are(pool, faults):
    code = SplineCode.systematic(5, 40)
    prediction = make_server(pool, stop.answers(40), code)(X[:5])
    assert_close(prediction.values, coded(f, code)(jnp.asarray(X[:5]), prediction.returned))


# ---- inputs that are not finite, integers, precision ---------------------------------------------------------


@pytest.mark.parametrize(
    "code", [CODE, BerrutCode.chebyshev(5, 12), ReplicationCode(5, 12)], ids=["spline", "Berrut", "copies"]
)
@pytest.mark.parametrize("order", [None, ordering.greedy], ids=["as it is", "ordered"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_inputs_that_are_not_finite_spoil_only_their_own_results(pool, faults, caplog, code, order, value):
    x = X.copy()
    spoilt = [0, 9, 16]
    x[spoilt, [0, 3, 1]] = value
    others = np.delete(np.arange(17), spoilt)
    server = make_server(pool, stop.answers(12), code, order=order, predict_error=None)
    expected = server(X[others])
    with caplog.at_level(logging.WARNING, "jaxcode"):
        prediction = server(x)
    assert any("inputs 0, 9, 16 of a batch of 17" in record.getMessage() for record in caplog.records)
    for leaf, leaf_of_others in zip(jax.tree.leaves(prediction.values), jax.tree.leaves(expected.values), strict=True):
        assert np.isnan(leaf[spoilt]).all()
        np.testing.assert_array_equal(leaf[others], leaf_of_others)
    assert not prediction.exact[spoilt].any()
    np.testing.assert_array_equal(prediction.exact[others], expected.exact)
    if code.predicts_error:
        assert np.isinf(prediction.error[spoilt]).all()
        np.testing.assert_array_equal(prediction.error[others], expected.error)


def test_a_number_too_large_for_single_precision_is_not_finite(pool, faults):
    x = X.astype(np.float64)
    x[2, 1] = 1e300
    prediction = make_server(pool, stop.answers(12))(x)
    assert np.flatnonzero(np.isnan(prediction.values["norm"])).tolist() == [2]


def test_a_batch_without_a_finite_input_raises(pool):
    with pytest.raises(ValueError, match="x has a NaN or an infinite number in every one of its 2 inputs"):
        make_server(pool, stop.answers(3))(np.full((2, 4), np.nan, np.float32))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_codes_that_do_not_mix_serve_integer_tokens(dtype):
    model = nnx.Embed(100, 3, rngs=nnx.Rngs(0))
    tokens = np.arange(28, dtype=dtype).reshape(7, 4)
    with pools.ThreadPool(model, 6) as pool:
        prediction = CodedServer(ReplicationCode(2, 6), pool, stop.answers(4))(tokens)
        np.testing.assert_array_equal(prediction.values, model(jnp.asarray(tokens)))


def test_a_code_that_mixes_raises_for_integers(pool):
    with pytest.raises(ValueError, match=r"dtype int32.*embeddings"):
        make_server(pool, stop.answers(3))(np.ones((5, 4), np.int32))


def test_codes_that_do_not_mix_keep_integers_that_single_precision_cannot_hold():
    with pools.ThreadPool(lambda x: (x % 10).astype(jnp.float32), 3) as pool:
        prediction = CodedServer(ReplicationCode(2, 3), pool, stop.answers(2))(np.array([2**24 + 1, 7]))
    np.testing.assert_array_equal(prediction.values, [7, 7])


def test_every_thread_computes_in_the_precision_in_which_the_server_was_made():
    x = np.random.default_rng(1).normal(size=(5, 4))
    with jax.enable_x64(True), pools.ThreadPool(f, 12) as pool:
        server = CodedServer(CODE, pool, stop.answers(12), time_limit=60.0)
        server.warm_up(x)
        expected = f(jnp.asarray(x))
        inside = [server(x), server.submit(x).result(60)]
        with jax.enable_x64(False):
            outside = [server(x), server.submit(x).result(60), asyncio.run(server.predict_async(x))]
        server.close()
    for prediction in (*inside, *outside):
        for name, leaf in prediction.values.items():
            assert leaf.dtype == np.float64
            np.testing.assert_allclose(leaf, expected[name], rtol=1e-12)


def test_a_server_of_single_precision_raises_for_callers_in_double_precision(pool):
    server = make_server(pool, stop.answers(12))
    with jax.enable_x64(True):
        for call in (server, server.submit, server.warm_up):
            with pytest.raises(ValueError, match="x64 is on here, but was off where the server was made"):
                call(X.astype(np.float64))


def test_a_warm_server_transfers_nothing_implicitly(pool, faults):
    x = X.copy()
    x[3] = np.nan
    server = CodedServer(CODE, pool, stop.answers(12), order=ordering.greedy, defence=robust.only_finite)
    server(x)
    with jax.transfer_guard("disallow"):
        prediction = server(x)
    assert np.flatnonzero(np.isnan(prediction.values["norm"])).tolist() == [3]


@pytest.mark.parametrize("setting", [jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")])
def test_strict_promotion_changes_nothing(pool, faults, setting):
    server = make_server(pool, stop.answers(12), order=ordering.greedy)
    expected = server(X)
    jax.clear_caches()
    with setting:
        assert_close(server(X).values, expected.values)
