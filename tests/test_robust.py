import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode import BerrutCode, LagrangeCode, ReplicationCode, SplineCode, coded, robust
from jaxcode._leave_one_out import NOISE, NOISE_OF_TWINS, _prepare
from jaxcode.robust import error_locator, finite, leave_one_out, only_finite

from . import attacks

# One size for all: what is compiled for one code serves every other.
K, N, GROUPS, OUTPUTS = 10, 40, 8, 3
LAYOUTS = {
    "chebyshev": SplineCode.chebyshev(K, N),
    "systematic": SplineCode.systematic(K, N),
    "repeated": SplineCode.repeated(K, N),
    "berrut": BerrutCode.chebyshev(K, N),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def rng(seed=0):
    return np.random.default_rng(seed)


def some_missing(seed, missing=6):
    return ~np.isin(np.arange(N), rng(seed).choice(N, missing, replace=False))


def network(x):
    weights = rng(7)
    inner = np.tanh(x @ weights.normal(size=(4, 16)))
    return inner @ weights.normal(size=(16, OUTPUTS))


def honest(code, f=network):
    """Answers (groups, N, outputs) of f on inputs that walk about."""
    x = np.cumsum(rng(3).normal(size=(GROUPS, K, 4)), axis=1) / 3 + rng(4).normal(size=(GROUPS, 1, 4))
    return np.asarray(f(np.einsum("nk,gkd->gnd", np.asarray(code.encoder_matrix(), float), x)))


def flat(answers):
    return jnp.asarray(answers.reshape(-1, answers.shape[2]), jnp.float32)


def suspects(code, answers, returned, **setting):
    return np.flatnonzero(leave_one_out(code, flat(answers), returned, **setting).suspected)


def decoded(code, answers, returned):
    sent = np.where(returned[:, None], np.swapaxes(answers, 0, 1).reshape(N, -1), 0)
    return np.asarray(code.decoder_matrix(returned), float) @ sent


def error(code, answers, returned, truth):
    return np.sqrt(np.mean((decoded(code, answers, returned) - truth) ** 2))


# ---- answers that are not numbers --------------------------------------------------------------------------


def test_a_worker_that_returns_anything_but_numbers_has_not_returned():
    answers = {
        "wide": np.ones((2, N, 5, 2), np.float32),
        "flat": np.ones((2, N), np.float32),
        "whole": np.ones(2 * N, int),
    }
    answers["wide"][1, 3, 2, 1] = np.nan
    answers["flat"][0, 7] = np.inf
    answers["flat"][1, 11] = -np.inf
    answers["flat"][0, 20] = np.nan
    answers = {name: jnp.asarray(leaf.reshape(2 * N, *leaf.shape[2:])) for name, leaf in answers.items()}
    returned = np.arange(N) != 20
    found = jax.jit(finite)(answers, returned)
    np.testing.assert_array_equal(found, ~np.isin(np.arange(N), [3, 7, 11, 20]))
    report = only_finite(ReplicationCode(K, N), answers, returned)
    np.testing.assert_array_equal(np.flatnonzero(report.suspected), [3, 7, 11])
    np.testing.assert_array_equal(np.isinf(report.score), report.suspected)


@pytest.mark.parametrize("defence", [leave_one_out, functools.partial(error_locator, num_liars=1)])
def test_they_are_suspected_and_blind_nobody(defence):
    code, returned = LAYOUTS["chebyshev"], some_missing(0)
    liar, broken = np.flatnonzero(returned)[[9, 20]]
    answers = honest(code)
    answers[:, liar] *= -3
    answers[2, broken, 1] = np.nan
    answers[:, ~returned] = np.nan
    report = defence(code, flat(answers), returned)
    np.testing.assert_array_equal(np.flatnonzero(report.suspected), [liar, broken])
    np.testing.assert_array_equal(report.returned, returned & ~np.asarray(report.suspected))
    assert np.isinf(report.score[broken])
    assert np.isfinite(np.delete(report.score, broken)).all()


# ---- nobody lies -------------------------------------------------------------------------------------------

FUNCTIONS = {
    "network": network,
    "sine": lambda x: np.sin(2 * x[..., :OUTPUTS]),
    "quadratic": lambda x: x[..., :OUTPUTS] ** 2,
    "kinks": lambda x: np.abs(x[..., :OUTPUTS] - 0.3),
    "steps": lambda x: 1.0 * (x[..., :OUTPUTS] > 0.2),
    "rough": lambda x: np.sin(40 * x[..., :OUTPUTS]),
    "constant": lambda x: np.ones_like(x[..., :OUTPUTS]),
    "large-and-small": lambda x: network(x) * np.array([1e8, 1.0, 1e-8]),
    "noise": lambda x: rng(5).normal(size=(*x.shape[:-1], OUTPUTS)),
    "noisy": lambda x: network(x) + 0.05 * rng(5).normal(size=(*x.shape[:-1], OUTPUTS)),
}


@each_layout
@pytest.mark.parametrize("function", FUNCTIONS)
def test_hardly_any_honest_worker_is_suspected(layout, function):
    code = LAYOUTS[layout]
    counts = [len(suspects(code, honest(code, FUNCTIONS[function]), some_missing(seed))) for seed in range(4)]
    assert max(counts) <= 1


@pytest.mark.parametrize("layout", ["chebyshev", "repeated"])
def test_not_even_on_the_evidence_of_one_group_and_output(layout):
    code = LAYOUTS[layout]
    at = np.asarray(code.encoder_matrix(), float) @ np.linspace(-1, 1, K)
    for f in (lambda x: np.sin(3 * x), lambda x: 8 * x * np.sin(8 * x), np.abs, np.sign):
        # Repeated to the size of the others; copies are no evidence.
        answers = np.tile(f(at)[None, :, None], GROUPS * OUTPUTS)
        counts = [len(suspects(code, answers, some_missing(seed))) for seed in range(4)]
        assert max(counts) <= 1


# ---- somebody lies -----------------------------------------------------------------------------------------


def lied_to(code, attack, liars_of, number, seed, size=6.0):
    answers, returned = honest(code), some_missing(seed)
    liars = liars_of(np.flatnonzero(returned), number, rng(seed + 50))
    return answers, attack(answers, liars, size, rng(seed + 90)), returned, np.sort(liars)


def anywhere(workers, number, random):
    return random.choice(workers, number, replace=False)


def side_by_side(workers, number, random):
    first = random.integers(0, len(workers) - number + 1)
    return workers[first : first + number]


@pytest.mark.parametrize("number", [1, 3, 5])
@pytest.mark.parametrize("attack", attacks.ALONE)
@pytest.mark.parametrize("layout", ["chebyshev", "systematic", "repeated"])
def test_lies_do_little_more_harm_than_silence(layout, attack, number):
    code = LAYOUTS[layout]
    truth = decoded(code, honest(code), np.ones(N, bool))
    harm, undefended = [], []
    for seed in range(4):
        answers, sent, returned, liars = lied_to(code, attacks.ALONE[attack], anywhere, number, seed)
        left = returned & ~np.isin(np.arange(N), suspects(code, sent, returned))
        # A hundredth of the answers is what nobody would mind; with twins silence does no harm at all.
        silent = error(code, answers, returned & ~np.isin(np.arange(N), liars), truth) + 0.03 * np.std(truth)
        harm.append(error(code, sent, left, truth) / silent)
        undefended.append(error(code, sent, returned, truth) / silent)
    # Where twins are left in pairs, a copy of what is sent elsewhere may fit the curve as well as the truth.
    assert np.median(harm) <= (max(1.3, np.median(undefended) / 3) if attack == "copy" else 1.3)
    # Where an input's own worker is right, one liar elsewhere does no harm.
    assert number < 3 or np.median(undefended) > 2


@pytest.mark.parametrize("attack", attacks.TOGETHER)
@pytest.mark.parametrize("layout", ["chebyshev", "systematic"])
def test_neighbours_who_back_each_other_up_are_found(layout, attack):
    code = LAYOUTS[layout]
    for seed in range(6):
        _, sent, returned, liars = lied_to(code, attacks.TOGETHER[attack], side_by_side, 3, seed)
        np.testing.assert_array_equal(suspects(code, sent, returned), liars)


@pytest.mark.parametrize("end", [slice(0, 2), slice(-2, None)])
def test_liars_at_an_end_are_found(end):
    code, returned = LAYOUTS["chebyshev"], some_missing(1)
    liars = np.flatnonzero(returned)[end]
    sent = attacks.shift(honest(code), liars, 6.0, rng())
    np.testing.assert_array_equal(suspects(code, sent, returned), liars)


def test_twins_outvote_a_liar_between_them():
    """Workers 4 to 7 compute the same; the third lies by more than the curve could tell."""
    code = LAYOUTS["repeated"]
    assert np.ptp(code.worker_nodes[4:8]) == 0
    sent = attacks.shift(honest(code), np.array([6]), 6.0, rng())
    np.testing.assert_array_equal(suspects(code, sent, np.ones(N, bool)), [6])


def test_on_a_smooth_function_a_tiny_lie_in_one_group_is_found():
    code = LAYOUTS["chebyshev"]
    answers = np.sin(np.asarray(code.encoder_matrix(), float) @ np.linspace(-1, 1, K))[None, :, None]
    sent = np.tile(attacks.shift(answers, np.array([17]), 0.05, rng()), GROUPS * OUTPUTS)
    np.testing.assert_array_equal(suspects(code, sent, some_missing(0) | (np.arange(N) == 17)), [17])


def test_no_more_are_suspected_than_may_be():
    code, returned = LAYOUTS["chebyshev"], np.ones(N, bool)
    sent = attacks.noise(honest(code), np.arange(0, N, 4), 30.0, rng())
    np.testing.assert_array_equal(suspects(code, sent, returned), np.arange(0, N, 4))
    assert len(suspects(code, sent, returned, most=0.1)) <= 3
    assert len(suspects(code, sent, returned, most=0.0)) == 0


@pytest.mark.parametrize("present", [[], [5], [5, 30], [5, 9, 30], [1, 2, 3, 4], [4, 5, 6, 7, 8]], ids=str)
def test_too_few_to_tell_are_all_believed(present):
    returned = np.isin(np.arange(N), present)
    for code in LAYOUTS.values():
        report = leave_one_out(code, flat(attacks.noise(honest(code), np.array([5]), 9.0, rng())), returned, most=0.3)
        np.testing.assert_array_equal(report.returned, returned)
        assert np.isfinite(report.score).all()


# ---- what it depends on ------------------------------------------------------------------------------------


def test_the_precision_is_that_of_the_process():
    """Against the kernel of an integrated Wiener process with the straight line projected out, twins included."""
    code = SplineCode(np.linspace(-1, 1, 5), np.sort(np.append(rng(1).uniform(-1, 1, 9), [0.25, 0.25])))
    live = np.arange(11) != 4
    with jax.enable_x64(True):
        nodes = jnp.asarray(code.worker_nodes), jnp.asarray(code.data_nodes)
        setting = jax.jit(_prepare)(*nodes, jnp.ones((11, 1)), jnp.asarray(live), 0.0, 0.5)
        found = np.asarray(setting.precision)[np.ix_(live, live)]
        scale = np.asarray(setting.outputs)[live, 0]
    t = code.worker_nodes[live]
    kernel = 2.0**3 * np.abs(t[:, None] - t) ** 3 / 12  # two inputs per unit of length
    line = np.stack([np.ones_like(t), t], axis=1)

    def projected(covariance):
        inverse = np.linalg.inv(covariance)
        return inverse - inverse @ line @ np.linalg.solve(line.T @ inverse @ line, line.T @ inverse)

    twin = np.isin(t, 0.25)
    sites = np.flatnonzero(~twin | (np.cumsum(twin) <= 1))
    of_sites = 1 / np.diag(_projected_without_noise(kernel[np.ix_(sites, sites)], line[sites]))
    variance = of_sites[np.searchsorted(t[sites], t)]
    noise = np.where(twin, NOISE_OF_TWINS, NOISE) * np.median(variance)
    expected = projected(kernel + np.diag(noise))
    np.testing.assert_allclose(found * scale * scale[:, None], expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def _projected_without_noise(kernel, line):
    """The kernel is definite only where straight lines are projected out."""
    across = np.linalg.svd(line.T)[2][2:].T
    return across @ np.linalg.solve(across.T @ kernel @ across, across.T)


def case(layout="chebyshev", seed=2):
    code = LAYOUTS[layout]
    _, sent, returned, liars = lied_to(code, attacks.shift, anywhere, 3, seed)
    return code, sent, returned, liars


def test_units_of_outputs_and_order_of_groups_do_not_matter():
    code, sent, returned, liars = case()
    for other in (sent * np.array([1e6, 1.0, 1e-6]), sent[::-1], sent[..., ::-1], 1e4 * sent):
        np.testing.assert_array_equal(suspects(code, other, returned), liars)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_answers(dtype):
    code, sent, returned, liars = case()
    report = leave_one_out(code, flat(sent).astype(dtype), returned)
    np.testing.assert_array_equal(np.flatnonzero(report.suspected), liars)


def test_the_same_with_x64_on():
    code, sent, returned, liars = case()
    with jax.enable_x64(True):
        report = jax.jit(functools.partial(leave_one_out, code))(jnp.asarray(sent.reshape(-1, OUTPUTS)), returned)
    np.testing.assert_array_equal(np.flatnonzero(report.suspected), liars)
    assert report.score.dtype == jnp.float32


def test_masks_and_groups_may_be_traced_and_mapped():
    code, sent, _, _ = case()
    masks = np.stack([some_missing(seed) for seed in range(3)])
    alone = [leave_one_out(code, flat(sent), returned) for returned in masks]
    mapped = jax.jit(jax.vmap(lambda mask: leave_one_out(code, flat(sent), mask)))(jnp.asarray(masks))
    for i, report in enumerate(alone):
        np.testing.assert_array_equal(mapped.suspected[i], report.suspected)
        np.testing.assert_allclose(mapped.score[i], report.score, rtol=1e-3)


# ---- ApproxIFER's locator ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["berrut", "chebyshev"])
def test_the_locator_finds_as_many_liars_as_it_is_told(layout):
    code = LAYOUTS[layout]
    answers = np.sin(2 * code.worker_nodes[:, None] + rng(2).normal(size=(GROUPS, 1, OUTPUTS)))
    for seed in range(4):
        returned = some_missing(seed)
        liars = anywhere(np.flatnonzero(returned), 2, rng(seed))
        sent = attacks.noise(answers, liars, 2.0, rng(seed))
        report = error_locator(code, flat(sent), returned, num_liars=2)
        np.testing.assert_array_equal(np.flatnonzero(report.suspected), np.sort(liars))
    assert np.sum(error_locator(code, flat(honest(code)), returned, num_liars=2).suspected) == 2


# ---- in the coded call -------------------------------------------------------------------------------------

LIAR = 16


def lying(x):
    """Batches hold all workers' inputs, group after group."""
    rows = jnp.arange(x.shape[0])[:, None] % N
    return jnp.where(rows == LIAR, -3.0, 1.0) * jnp.tanh(x @ jnp.array([[1.0, -2.0], [0.5, 1.0]])) + 3 * (rows == LIAR)


@pytest.fixture(scope="module")
def batch():
    return jnp.asarray(np.cumsum(rng(4).normal(size=(3 * K - 2, 2)), axis=0) / 4, jnp.float32)


def test_decoding_goes_on_without_the_suspects(batch):
    code, returned = LAYOUTS["chebyshev"], some_missing(1) | (np.arange(N) == LIAR)
    predict = coded(lying, code, defence=leave_one_out)
    without = coded(lying, code)(batch, returned & (np.arange(N) != LIAR))
    assert np.abs(coded(lying, code)(batch, returned) - without).max() > 0.5
    np.testing.assert_allclose(predict(batch, returned), without, rtol=1e-5, atol=1e-5)
    results, suspicion = predict.inspect(batch, returned)
    np.testing.assert_array_equal(results, predict(batch, returned))
    np.testing.assert_array_equal(np.flatnonzero(suspicion.suspected), [LIAR])


def test_it_is_mapped_over_masks_and_differentiated_as_for_the_mask_that_was_found(batch):
    code, returned = LAYOUTS["chebyshev"], some_missing(1) | (np.arange(N) == LIAR)
    masks = np.stack([returned, returned & (np.arange(N) != LIAR)])

    def loss(predict):
        return lambda x, mask: jnp.sum(jnp.cos(predict(x, mask)))

    defended = jax.value_and_grad(loss(coded(lying, code, defence=leave_one_out)))
    values, slopes = jax.jit(jax.vmap(defended, (None, 0)))(batch, masks)
    value, slope = jax.value_and_grad(loss(coded(lying, code)))(batch, masks[1])
    np.testing.assert_allclose(values, [value, value], rtol=1e-5)
    np.testing.assert_allclose(slopes, jnp.stack([slope, slope]), rtol=1e-4, atol=1e-4)


def test_a_defence_is_any_function(batch):
    def distrust_the_first(code, answers, returned):
        returned = jnp.asarray(returned)
        first = jnp.arange(code.num_workers) == 0
        return robust.Suspicion(returned & ~first, returned & first, jnp.zeros(code.num_workers))

    code = ReplicationCode(K, N)
    predict = coded(lambda x: 2 * x, code, defence=distrust_the_first)
    found = predict(batch, np.arange(N) < K)
    lost = np.arange(len(batch)) % K == 0
    np.testing.assert_array_equal(np.isnan(found), np.broadcast_to(lost[:, None], found.shape))
    assert not hasattr(coded(lambda x: 2 * x, code), "inspect")


# ---- bad arguments -----------------------------------------------------------------------------------------

ANSWERS, ALL = jnp.ones((2 * N, 3)), jnp.ones(N, bool)
REFUSED = {
    "no-curve": (
        lambda: leave_one_out(ReplicationCode(K, N), ANSWERS, ALL),
        "code is .*SplineCode.repeated.*only_finite",
    ),
    "no-curve-to-locate": (
        lambda: error_locator(ReplicationCode(K, N), ANSWERS, ALL, num_liars=1),
        "for error_locator",
    ),
    "short-mask": (lambda: leave_one_out(LAYOUTS["berrut"], ANSWERS, ALL[1:]), r"returned has shape \(39,\)"),
    "mask-of-numbers": (lambda: finite(ANSWERS, jnp.ones(N)), "returned has dtype float32"),
    "part-of-a-group": (lambda: finite({"a": ANSWERS[1:]}, ALL), r"answers\['a'\] has shape \(79, 3\).*of 40"),
    "no-liars": (lambda: error_locator(LAYOUTS["berrut"], ANSWERS, ALL, num_liars=0), "num_liars is 0"),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_refuses(unchecked, refused):
    call, message = REFUSED[refused]
    with pytest.raises(ValueError, match=message):
        call()


def test_every_code_with_a_curve_is_defended():
    code = LagrangeCode.chebyshev(K, N)
    answers = np.sin(code.worker_nodes[:, None] + rng(2).normal(size=(GROUPS, 1, OUTPUTS)))
    np.testing.assert_array_equal(
        suspects(code, attacks.shift(answers, np.array([9]), 2.0, rng()), np.ones(N, bool)), [9]
    )
