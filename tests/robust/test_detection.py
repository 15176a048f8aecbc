"""What all defences share: answers that are no finite numbers, groups, refused arguments, and the coded call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode import ReplicationCode, coded, robust
from jaxcode.robust import error_locator, finite, leave_one_out, only_finite

from .cases import LAYOUTS, K, N, correct_answers, random_mask, rng

DEFENCES = {
    "only_finite": only_finite,
    "leave_one_out": leave_one_out,
    "error_locator": functools.partial(error_locator, num_faulty=1),
}

# ---- answers that are not finite ---------------------------------------------------------------------------


def test_a_worker_with_any_number_that_is_not_finite_is_flagged():
    answers = {
        "wide": np.ones((N, 2, 5, 2), np.float32),
        "flat": np.ones((N, 2), np.float32),
        "whole": np.ones((N, 2), int),
    }
    answers["wide"][3, 1, 2, 1] = np.nan
    answers["flat"][7, 0] = np.inf
    answers["flat"][11, 1] = -np.inf
    answers["flat"][20, 0] = np.nan
    answers = jax.tree.map(jnp.asarray, answers)
    returned = np.arange(N) != 20
    found = jax.jit(finite)(answers, returned)
    np.testing.assert_array_equal(found, ~np.isin(np.arange(N), [3, 7, 11, 20]))
    detection = only_finite(ReplicationCode(K, N), answers, returned)
    np.testing.assert_array_equal(np.flatnonzero(detection.flagged), [3, 7, 11])
    np.testing.assert_array_equal(np.isinf(detection.score), detection.flagged)


@pytest.mark.parametrize("defence", ["leave_one_out", "error_locator"])
def test_answers_that_are_not_finite_are_flagged_and_disturb_no_other(defence):
    code, returned = LAYOUTS["chebyshev"], random_mask(0)
    faulty, broken = np.flatnonzero(returned)[[9, 20]]
    answers = correct_answers(code)
    answers[faulty] *= -3
    answers[broken, 2, 1] = np.nan
    answers[~returned] = np.nan
    detection = DEFENCES[defence](code, jnp.asarray(answers, jnp.float32), returned)
    np.testing.assert_array_equal(np.flatnonzero(detection.flagged), [faulty, broken])
    np.testing.assert_array_equal(detection.trusted, returned & ~np.asarray(detection.flagged))
    assert np.isinf(detection.score[broken])
    assert np.isfinite(np.delete(detection.score, broken)).all()


# ---- in the coded call -------------------------------------------------------------------------------------

FAULTY = 16


def faulty_model(x):
    """The batch is all workers' inputs, worker after worker."""
    is_of_faulty = jnp.arange(x.shape[0])[:, None] // (x.shape[0] // N) == FAULTY
    return jnp.where(is_of_faulty, -3.0, 1.0) * jnp.tanh(x @ jnp.array([[1.0, -2.0], [0.5, 1.0]])) + 3 * is_of_faulty


@pytest.fixture(scope="module")
def batch():
    return jnp.asarray(np.cumsum(rng(4).normal(size=(3 * K - 2, 2)), axis=0) / 4, jnp.float32)


def test_flagged_workers_are_decoded_without(batch):
    code, returned = LAYOUTS["chebyshev"], random_mask(1) | (np.arange(N) == FAULTY)
    predict = coded(faulty_model, code, defence=leave_one_out)
    expected = coded(faulty_model, code)(batch, returned & (np.arange(N) != FAULTY))
    assert np.abs(coded(faulty_model, code)(batch, returned) - expected).max() > 0.5
    np.testing.assert_allclose(predict(batch, returned), expected, rtol=1e-5, atol=1e-5)
    results, detection = predict.inspect(batch, returned)
    np.testing.assert_array_equal(results, predict(batch, returned))
    np.testing.assert_array_equal(np.flatnonzero(detection.flagged), [FAULTY])


def test_derivatives_are_those_for_the_mask_that_was_found(batch):
    code, returned = LAYOUTS["chebyshev"], random_mask(1) | (np.arange(N) == FAULTY)
    masks = np.stack([returned, returned & (np.arange(N) != FAULTY)])

    def loss(predict):
        return lambda x, mask: jnp.sum(jnp.cos(predict(x, mask)))

    defended = jax.value_and_grad(loss(coded(faulty_model, code, defence=leave_one_out)))
    values, slopes = jax.jit(jax.vmap(defended, (None, 0)))(batch, masks)
    value, slope = jax.value_and_grad(loss(coded(faulty_model, code)))(batch, masks[1])
    np.testing.assert_allclose(values, [value, value], rtol=1e-5)
    np.testing.assert_allclose(slopes, jnp.stack([slope, slope]), rtol=1e-4, atol=1e-4)


def test_a_defence_is_any_function(batch):
    def flag_the_first(code, answers, returned):
        returned = jnp.asarray(returned)
        first = jnp.arange(code.num_workers) == 0
        return robust.Detection(returned & ~first, returned & first, jnp.zeros(code.num_workers))

    code = ReplicationCode(K, N)
    predict = coded(lambda x: 2 * x, code, defence=flag_the_first)
    found = predict(batch, np.arange(N) < K)
    lost = np.arange(len(batch)) % K == 0
    np.testing.assert_array_equal(np.isnan(found), np.broadcast_to(lost[:, None], found.shape))


# ---- arguments ---------------------------------------------------------------------------------------------

ANSWERS, ALL = jnp.ones((N, 2, 3)), jnp.ones(N, bool)
REFUSED = {
    "no-curve": (
        lambda: leave_one_out(ReplicationCode(K, N), ANSWERS, ALL),
        "code is .*SplineCode.repeated.*only_finite",
    ),
    "no-curve-to-locate": (
        lambda: error_locator(ReplicationCode(K, N), ANSWERS, ALL, num_faulty=1),
        "for error_locator",
    ),
    "short-mask": (lambda: leave_one_out(LAYOUTS["berrut"], ANSWERS, ALL[1:]), r"returned has shape \(39,\)"),
    "mask-of-numbers": (lambda: finite(ANSWERS, jnp.ones(N)), "returned has dtype float32"),
    "missing-rows": (lambda: finite({"a": ANSWERS[1:]}, ALL), r"answers\['a'\] has shape \(39, 2, 3\).*40"),
    "more-than-all": (
        lambda: leave_one_out(LAYOUTS["berrut"], ANSWERS, ALL, max_fraction=1.5),
        "max_fraction is 1.5; .*from 0 to 1",
    ),
    "none-faulty": (lambda: error_locator(LAYOUTS["berrut"], ANSWERS, ALL, num_faulty=0), "num_faulty is 0"),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_refuses(unchecked, refused):
    call, message = REFUSED[refused]
    with pytest.raises(ValueError, match=message):
        call()
