"""Flagging by leave-one-out residuals: what is flagged, what is not, and what neither may depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode import LagrangeCode
from jaxcode.robust import leave_one_out, search

from . import attacks
from .cases import (
    FUNCTIONS,
    GROUPS,
    LAYOUTS,
    OUTPUTS,
    K,
    N,
    attacked_answers,
    choose_anywhere,
    choose_neighbours,
    correct_answers,
    flagged_workers,
    random_mask,
    rng,
)


def decode(code, answers, returned):
    sent = np.where(returned[:, None], answers.reshape(N, -1), 0)
    return np.asarray(code.decoder_matrix(returned), float) @ sent


def error(code, answers, returned, truth):
    return np.sqrt(np.mean((decode(code, answers, returned) - truth) ** 2))


def one_group(code, f):
    """One group and output, (N, 1, 1), repeated to the size of the others; copies are no evidence."""
    answers = f(np.asarray(code.encoder_matrix(), float) @ np.linspace(-1, 1, K))
    return np.tile(answers[:, None, None], GROUPS * OUTPUTS)


# ---- no worker is faulty -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_hardly_any_correct_worker_is_flagged(layout, function):
    code = LAYOUTS[layout]
    answers = correct_answers(code, FUNCTIONS[function])
    assert max(len(flagged_workers(code, answers, random_mask(seed))) for seed in range(4)) <= 1


@pytest.mark.parametrize("layout", ["chebyshev", "repeated"])
def test_hardly_any_correct_worker_is_flagged_for_one_group_and_output(layout):
    code = LAYOUTS[layout]
    for f in (lambda x: np.sin(3 * x), lambda x: 8 * x * np.sin(8 * x), np.abs, np.sign):
        answers = one_group(code, f)
        assert max(len(flagged_workers(code, answers, random_mask(seed))) for seed in range(4)) <= 1


# ---- some workers are faulty -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 3, 5])
@pytest.mark.parametrize("attack", attacks.INDEPENDENT)
@pytest.mark.parametrize("layout", ["chebyshev", "systematic", "repeated"])
def test_wrong_answers_do_little_more_harm_than_missing_ones(layout, attack, number):
    code = LAYOUTS[layout]
    truth = decode(code, correct_answers(code), np.ones(N, bool))
    harm, undefended = [], []
    for seed in range(4):
        answers, sent, returned, faulty = attacked_answers(
            code, attacks.INDEPENDENT[attack], choose_anywhere, number, seed
        )
        trusted = returned & ~np.isin(np.arange(N), flagged_workers(code, sent, returned))
        # A few hundredths of the answers' size are added: with two workers at each node, a missing one does no harm.
        missing = error(code, answers, returned & ~np.isin(np.arange(N), faulty), truth) + 0.03 * np.std(truth)
        harm.append(error(code, sent, trusted, truth) / missing)
        undefended.append(error(code, sent, returned, truth) / missing)
    # Of two workers at one node, a copy of a distant worker's answers may fit the curve as well as the correct ones.
    assert np.median(harm) <= (max(1.3, np.median(undefended) / 3) if attack == "copy" else 1.3)
    # Where each input's own worker is correct, one faulty worker elsewhere does no harm.
    assert number < 3 or np.median(undefended) > 2


@pytest.mark.parametrize("attack", attacks.COORDINATED)
@pytest.mark.parametrize("layout", ["chebyshev", "systematic"])
def test_faulty_neighbours_that_support_each_other_are_flagged(layout, attack):
    code = LAYOUTS[layout]
    for seed in range(6):
        _, sent, returned, faulty = attacked_answers(code, attacks.COORDINATED[attack], choose_neighbours, 3, seed)
        np.testing.assert_array_equal(flagged_workers(code, sent, returned), faulty)


@pytest.mark.parametrize("end", [slice(0, 2), slice(-2, None)])
def test_faulty_workers_at_an_end_are_flagged(end):
    code, returned = LAYOUTS["chebyshev"], random_mask(1)
    faulty = np.flatnonzero(returned)[end]
    sent = attacks.shift(correct_answers(code), faulty, 6.0, rng())
    np.testing.assert_array_equal(flagged_workers(code, sent, returned), faulty)


def test_of_four_workers_at_one_node_the_faulty_one_is_flagged():
    """Workers 4 to 7 compute the same, and the third is wrong by less than the curve could tell."""
    code = LAYOUTS["repeated"]
    assert np.ptp(code.nodes.workers[4:8]) == 0
    sent = attacks.shift(correct_answers(code), np.array([6]), 6.0, rng())
    np.testing.assert_array_equal(flagged_workers(code, sent, np.ones(N, bool)), [6])


def test_a_small_shift_in_one_group_of_a_smooth_function_is_flagged():
    code, faulty = LAYOUTS["chebyshev"], np.array([17])
    sent = attacks.shift(one_group(code, np.sin)[..., :1], faulty, 0.05, rng())
    sent = np.tile(sent, GROUPS * OUTPUTS)
    np.testing.assert_array_equal(flagged_workers(code, sent, random_mask(0) | (np.arange(N) == 17)), faulty)


def test_every_group_is_evidence():
    """A small shift that one group cannot prove is proven by eight."""
    code, faulty = LAYOUTS["chebyshev"], np.array([17])
    sent = attacks.shift(correct_answers(code), faulty, 0.2, rng())
    assert len(flagged_workers(code, sent[:, :1], np.ones(N, bool))) == 0
    np.testing.assert_array_equal(flagged_workers(code, sent, np.ones(N, bool)), faulty)


def test_no_more_are_flagged_than_the_limit():
    code, returned = LAYOUTS["chebyshev"], np.ones(N, bool)
    sent = attacks.noise(correct_answers(code), np.arange(0, N, 4), 30.0, rng())
    np.testing.assert_array_equal(flagged_workers(code, sent, returned), np.arange(0, N, 4))
    assert len(flagged_workers(code, sent, returned, max_fraction=0.1)) <= 3
    assert len(flagged_workers(code, sent, returned, max_fraction=0.0)) == 0


@pytest.mark.parametrize("answering", [[], [5], [5, 30], [5, 9, 30], [1, 2, 3, 4], [4, 5, 6, 7, 8]], ids=str)
def test_too_few_answers_to_compare_are_all_trusted(answering):
    returned = np.isin(np.arange(N), answering)
    for code in LAYOUTS.values():
        sent = attacks.noise(correct_answers(code), np.array([5]), 9.0, rng())
        detection = leave_one_out(code, jnp.asarray(sent, jnp.float32), returned, max_fraction=0.3)
        np.testing.assert_array_equal(detection.trusted, returned)
        assert np.isfinite(detection.score).all()


def test_lagrange_codes_are_defended():
    code = LagrangeCode.chebyshev(K, N)
    answers = np.sin(code.nodes.workers[:, None, None] + rng(2).normal(size=(GROUPS, OUTPUTS)))
    sent = attacks.shift(answers, np.array([9]), 2.0, rng())
    np.testing.assert_array_equal(flagged_workers(code, sent, np.ones(N, bool)), [9])


# ---- what detection does not depend on ---------------------------------------------------------------------


def shifted_answers(layout="chebyshev", seed=2):
    code = LAYOUTS[layout]
    _, sent, returned, faulty = attacked_answers(code, attacks.shift, choose_anywhere, 3, seed)
    return code, sent, returned, faulty


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e4, 1e30])
def test_the_unit_of_the_answers_does_not_matter(scale):
    code, sent, returned, faulty = shifted_answers()
    np.testing.assert_array_equal(flagged_workers(code, scale * sent, returned), faulty)


def test_units_of_outputs_and_order_of_groups_do_not_matter():
    code, sent, returned, faulty = shifted_answers()
    for other in (sent * np.array([1e6, 1.0, 1e-6]), sent[:, ::-1], sent[..., ::-1]):
        np.testing.assert_array_equal(flagged_workers(code, other, returned), faulty)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_answers(dtype):
    code, sent, returned, faulty = shifted_answers()
    detection = leave_one_out(code, jnp.asarray(sent, dtype), returned)
    np.testing.assert_array_equal(np.flatnonzero(detection.flagged), faulty)


def test_the_same_with_x64_on():
    code, sent, returned, faulty = shifted_answers()
    with jax.enable_x64(True):
        detection = jax.jit(functools.partial(leave_one_out, code))(jnp.asarray(sent), returned)
    np.testing.assert_array_equal(np.flatnonzero(detection.flagged), faulty)
    assert detection.score.dtype == jnp.float32


def test_masks_may_be_traced_and_mapped():
    code, sent, _, _ = shifted_answers()
    sent = jnp.asarray(sent, jnp.float32)
    masks = np.stack([random_mask(seed) for seed in range(3)])
    mapped = jax.jit(jax.vmap(lambda mask: leave_one_out(code, sent, mask)))(jnp.asarray(masks))
    for i, returned in enumerate(masks):
        single = leave_one_out(code, sent, returned)
        np.testing.assert_array_equal(mapped.flagged[i], single.flagged)
        np.testing.assert_allclose(mapped.score[i], single.score, rtol=1e-3)


def test_the_search_uses_the_process_whose_noise_follows_the_density_of_inputs():
    """Against the kernel of an integrated Wiener process with straight lines projected out, two workers at one node."""
    data_nodes = np.linspace(-1, 1, 5)
    worker_nodes = np.sort(np.append(rng(1).uniform(-1, 1, 9), [0.25, 0.25]))
    live = np.arange(11) != 4
    with jax.enable_x64(True):
        nodes = jnp.asarray(worker_nodes), jnp.asarray(data_nodes)
        problem = jax.jit(search._prepare)(*nodes, jnp.ones((11, 1)), jnp.asarray(live), 0.0, 0.5)
        found = np.asarray(problem.precision)[np.ix_(live, live)]
        scale = np.asarray(problem.outputs)[live, 0]
    t = worker_nodes[live]
    kernel = 2.0**3 * np.abs(t[:, None] - t) ** 3 / 12  # two inputs per unit of length
    line = np.stack([np.ones_like(t), t], axis=1)

    def inverse(covariance, line):
        """The kernel is definite only where straight lines are projected out."""
        across = np.linalg.svd(line.T)[2][2:].T
        return across @ np.linalg.solve(across.T @ covariance @ across, across.T)

    is_pair = np.isin(t, 0.25)
    sites = np.flatnonzero(~is_pair | (np.cumsum(is_pair) <= 1))
    of_sites = inverse(kernel[np.ix_(sites, sites)], line[sites])
    variance = (1 / np.diag(of_sites))[np.searchsorted(t[sites], t)]
    noise = np.where(is_pair, search.PAIR_NOISE, search.NOISE) * np.median(variance)
    expected = inverse(kernel + np.diag(noise), line)
    np.testing.assert_allclose(found * scale * scale[:, None], expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
