import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcode import stragglers as sg

EXPONENTIAL = sg.ShiftedExponential(shift=0.1, scale=0.02)
# What a right sampler has one chance in a thousand to fail; the keys are fixed, so it fails never or always.
SMALLEST_P_VALUE = 1e-3

LATENCIES = {
    "shifted exponential": (EXPONENTIAL, scipy.stats.expon(loc=0.1, scale=0.02)),
    "pareto": (sg.Pareto(minimum=0.1, shape=1.5), scipy.stats.pareto(1.5, scale=0.1)),
    "lognormal": (sg.LogNormal(median=0.3, sigma=0.7), scipy.stats.lognorm(0.7, scale=0.3)),
    # The sum of two exponentials of one scale.
    "by host": (
        sg.CorrelatedByHost(sg.ShiftedExponential(0, 0.2), sg.ShiftedExponential(1, 0.2), 1),
        scipy.stats.gamma(2, loc=1, scale=0.2),
    ),
}
MODELS = {
    "uniform": sg.Uniform(5),
    "independent": sg.Independent(0.2),
    "first": sg.FirstToAnswer(EXPONENTIAL, 25),
    "deadline": sg.Deadline(sg.LogNormal(0.1, 0.5), 0.15),
    "first by host": sg.FirstToAnswer(sg.CorrelatedByHost(EXPONENTIAL, EXPONENTIAL, 4), 25),
    "empirical": sg.Empirical([0.1, 0.2, 0.2, 3.0]),
} | {name: model for name, (model, _) in LATENCIES.items()}

each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


@functools.partial(jax.jit, static_argnums=(2, 3))
def draw(model, key, num_workers=30, num_draws=2000):
    return jax.vmap(lambda key: model.sample(key, num_workers))(jax.random.split(key, num_draws))


def z_score(count, num_trials, probability):
    return (count - num_trials * probability) / np.sqrt(num_trials * probability * (1 - probability))


# ---- every model -------------------------------------------------------------------------------------------


@each_model
def test_jit_and_vmap_agree_with_eager_and_new_keys_do_not_recompile(model):
    keys = jax.random.split(jax.random.key(0), 3)
    eager = np.stack([model.sample(key, 30) for key in keys])
    batched = jax.jit(lambda model, keys: jax.vmap(lambda key: model.sample(key, 30))(keys))
    # Fused arithmetic may round the last bit of a latency differently.
    np.testing.assert_allclose(batched(model, keys), eager, rtol=1e-6)
    np.testing.assert_allclose(batched(model, keys[::-1]), eager[::-1], rtol=1e-6)
    assert batched._cache_size() == 1
    assert (eager[0] != eager[1]).any()


def test_new_parameters_do_not_recompile():
    jitted = jax.jit(lambda model, key: model.sample(key, 30).sum())
    returned = [jitted(sg.Uniform(num_stragglers), jax.random.key(0)) for num_stragglers in (0, 5, 30)]
    assert returned == [30, 25, 0]
    assert jitted._cache_size() == 1


@each_model
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("make_key", [jax.random.PRNGKey, jax.random.key])
def test_shape_and_dtype(model, x64, make_key):
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
        sample = jax.eval_shape(lambda key: model.sample(key, 30), make_key(0))
        floating = jnp.float64 if x64 else jnp.float32
    assert sample.shape == (30,)
    assert sample.dtype == (bool if isinstance(model, sg.AbstractStragglers) else floating)


@each_model
def test_is_a_pytree_rebuilt_without_checks(model):
    leaves, tree = jax.tree.flatten(model)
    rebuilt = jax.tree.unflatten(tree, leaves)
    np.testing.assert_array_equal(rebuilt.sample(jax.random.key(0), 30), model.sample(jax.random.key(0), 30))
    for placeholder in (None, object(), np.full((2, 2), -1.0)):
        assert jax.tree.unflatten(tree, [placeholder] * len(leaves)) is not None
    assert all(isinstance(path[-1], jax.tree_util.GetAttrKey) for path, _ in jax.tree.leaves_with_path(model))


STRICT_MODES = {
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "transfer guard": lambda: jax.transfer_guard("disallow"),
    "nans": lambda: jax.debug_nans(True),
}


@each_model
@pytest.mark.parametrize("mode", STRICT_MODES)
def test_samples_the_same_in_strict_modes(model, mode):
    key = jax.random.key(0)
    expected = np.asarray(model.sample(key, 30))
    jitted = jax.jit(lambda model, key: model.sample(key, 30))
    on_device = jax.device_put(model)
    jitted(on_device, key)
    with STRICT_MODES[mode]():
        samples = model.sample(key, 30), jitted(on_device, key)
    np.testing.assert_array_equal(samples[0], expected)
    np.testing.assert_allclose(samples[1], expected, rtol=1e-6)


def test_constructors_run_under_tracing():
    def sample(count, positive, key):
        latency = sg.CorrelatedByHost(sg.LogNormal(positive, positive), sg.Pareto(positive, positive), 4)
        masks = sg.Uniform(count), sg.Independent(positive / 2), sg.FirstToAnswer(latency, count)
        latencies = latency, sg.ShiftedExponential(positive, positive), sg.Empirical(positive * jnp.ones(2))
        return [model.sample(key, 8) for model in (*masks, sg.Deadline(latency, positive), *latencies)]

    batch = jax.jit(jax.vmap(sample, (0, 0, None)))(jnp.array([1, 3]), jnp.array([0.5, 1.0]), jax.random.key(0))
    uniform, _, first, *_ = batch
    assert uniform.sum(1).tolist() == [7, 5]
    assert first.sum(1).tolist() == [1, 3]


# ---- sets of stragglers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_stragglers", [0, 1, 4, 5])
def test_uniform_has_exactly_s_stragglers(num_stragglers):
    masks = draw(sg.Uniform(num_stragglers), jax.random.key(0), 5)
    assert (masks.sum(1) == 5 - num_stragglers).all()


@pytest.mark.parametrize("model", [sg.Uniform(2), sg.FirstToAnswer(EXPONENTIAL, 3)], ids=["uniform", "first"])
def test_every_set_is_equally_likely(model):
    masks = np.asarray(draw(model, jax.random.key(0), 5))
    sets, counts = np.unique(masks, axis=0, return_counts=True)
    assert len(sets) == 10
    assert scipy.stats.chisquare(counts).pvalue > SMALLEST_P_VALUE


@pytest.mark.parametrize("probability", [0.02, 0.5, 0.9])
def test_independent_is_binomial(probability):
    late = 30 - np.asarray(draw(sg.Independent(probability), jax.random.key(0)).sum(1))
    assert abs(z_score(late.sum(), 30 * late.size, probability)) < 3.3
    # The number of late workers varies as a binomial does only if workers are independent.
    variance = 30 * probability * (1 - probability)
    statistic = (late.size - 1) * late.var(ddof=1) / variance
    p_value = 2 * min(f(statistic, late.size - 1) for f in (scipy.stats.chi2.cdf, scipy.stats.chi2.sf))
    assert p_value > SMALLEST_P_VALUE


@pytest.mark.parametrize("probability", [0, 1])
def test_independent_at_its_ends(probability):
    assert (draw(sg.Independent(probability), jax.random.key(0)) == (probability == 0)).all()


@pytest.mark.parametrize("num_answers", [1, 7, 30])
def test_first_to_answer_is_the_shortest_of_the_same_draw(num_answers):
    key = jax.random.key(3)
    seconds = np.asarray(EXPONENTIAL.sample(key, 30))
    returned = np.asarray(sg.FirstToAnswer(EXPONENTIAL, num_answers).sample(key, 30))
    np.testing.assert_array_equal(np.flatnonzero(returned), np.sort(np.argsort(seconds)[:num_answers]))


def test_ties_leave_exactly_num_answers_and_favour_no_worker():
    masks = np.asarray(draw(sg.FirstToAnswer(sg.Empirical([1.0, 1.0]), 3), jax.random.key(0)))
    assert (masks.sum(1) == 3).all()
    largest = np.abs(z_score(masks.sum(0), len(masks), 3 / 30)).max()
    assert largest < scipy.stats.norm.isf(SMALLEST_P_VALUE / (2 * 30))


def test_dead_workers_never_return():
    half_dead = sg.Empirical([1.0, np.inf])
    alive = jnp.isfinite(draw(half_dead, jax.random.key(0)))
    masks = draw(sg.FirstToAnswer(half_dead, 15), jax.random.key(0))
    assert not (masks & ~alive).any()
    np.testing.assert_array_equal(masks.sum(1), np.minimum(15, alive.sum(1)))
    np.testing.assert_array_equal(draw(sg.Deadline(half_dead, np.inf), jax.random.key(0)), alive)


def test_deadline_is_a_threshold_on_the_same_draw_and_is_inclusive():
    key = jax.random.key(3)
    seconds = EXPONENTIAL.sample(key, 31)
    deadline = jnp.median(seconds)
    returned = sg.Deadline(EXPONENTIAL, deadline).sample(key, 31)
    np.testing.assert_array_equal(returned, seconds <= deadline)
    assert returned.sum() == 16


# ---- latencies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "law"), LATENCIES.values(), ids=LATENCIES)
@pytest.mark.parametrize("x64", [False, True])
def test_latency_follows_its_law(model, law, x64):
    with jax.enable_x64(x64):
        seconds = np.asarray(model.sample(jax.random.key(0), 20_000))
    assert scipy.stats.kstest(seconds, law.cdf).pvalue > SMALLEST_P_VALUE


@pytest.mark.parametrize(("model", "law"), LATENCIES.values(), ids=LATENCIES)
def test_workers_and_draws_are_independent(model, law):
    uniform = law.cdf(np.asarray(draw(model, jax.random.key(0), 2)))
    for pair in (uniform, np.column_stack((uniform[:-1, 0], uniform[1:, 1]))):
        assert scipy.stats.spearmanr(pair).pvalue > SMALLEST_P_VALUE


def test_empirical_draws_each_measurement_equally_often():
    measured = [0.1, 0.2, 0.4, 0.4, np.inf]
    values, counts = np.unique(sg.Empirical(measured).sample(jax.random.key(0), 20_000), return_counts=True)
    np.testing.assert_allclose(values, np.unique(measured), rtol=1e-6)
    assert scipy.stats.chisquare(counts, 4000 * np.array([1, 1, 2, 1])).pvalue > SMALLEST_P_VALUE


def test_workers_of_one_host_correlate_and_others_do_not():
    # All but normal, with variances in the ratio 1 to 3. Seven workers by three: the last host has one.
    model = sg.CorrelatedByHost(sg.LogNormal(1, 0.01), sg.LogNormal(1, 0.01 * 3**0.5), 3)
    seconds = np.asarray(draw(model, jax.random.key(0), 7, 20_000))
    host = np.arange(7) // 3
    expected = np.where(host[:, None] == host, 3 / 4, 0) * (1 - np.eye(7)) + np.eye(7)
    # A normal sample's correlation has standard error (1 - r^2) / sqrt(n).
    error = (1 - expected**2) / np.sqrt(20_000)
    assert (np.abs(np.corrcoef(seconds.T) - expected) <= 5 * error + 1e-6).all()


def test_hosts_are_runs_of_workers_and_nest_into_racks():
    same = sg.LogNormal(1.0, 0.0)
    racks = sg.CorrelatedByHost(same, sg.ShiftedExponential(0, 1), 2)
    seconds = np.asarray(sg.CorrelatedByHost(same, racks, 3).sample(jax.random.key(0), 14))
    runs = np.flatnonzero(np.diff(seconds)) + 1
    assert runs.tolist() == [6, 12]


@pytest.mark.parametrize(
    ("latency", "law"),
    [
        (lambda p: sg.ShiftedExponential(p, 2 * p), lambda p: scipy.stats.expon(p, 2 * p)),
        (lambda p: sg.Pareto(p, 3 * p), lambda p: scipy.stats.pareto(3 * p, scale=p)),
        (lambda p: sg.LogNormal(p, p), lambda p: scipy.stats.lognorm(p, scale=p)),
    ],
    ids=["shifted exponential", "pareto", "lognormal"],
)
def test_latency_differentiates_along_its_quantiles(latency, law):
    key, p, step = jax.random.key(0), 0.5, 1e-5
    with jax.enable_x64(True):
        slope = jax.jacfwd(lambda p: latency(p).sample(key, 20))(p)
        rank = law(p).cdf(np.asarray(latency(p).sample(key, 20)))
    expected = (law(p + step).ppf(rank) - law(p - step).ppf(rank)) / (2 * step)
    np.testing.assert_allclose(slope, expected, rtol=1e-6)


# ---- arguments ---------------------------------------------------------------------------------------------

# Where jaxtyping's runtime checker is on, it sees a wrong type first, and raises a TypeError.
WRONG_TYPE = (ValueError, TypeError)

wrong_types = st.sampled_from([None, "half", (1, 2), np.ones(2), np.array(True), 1j])
infinite, zero = st.just(np.inf), st.sampled_from([0, 0.0, np.float32(0)])
negative = st.sampled_from([np.nan, -1]) | st.floats(max_value=0, exclude_max=True)
too_few = st.integers(max_value=-1)

BAD_ARGUMENTS = {
    "num_stragglers": (sg.Uniform, too_few),
    "probability": (sg.Independent, negative | st.floats(1, exclude_min=True)),
    "num_answers": (lambda bad: sg.FirstToAnswer(EXPONENTIAL, bad), too_few | st.just(0)),
    "seconds": (lambda bad: sg.Deadline(EXPONENTIAL, bad), negative | zero),
    "shift": (lambda bad: sg.ShiftedExponential(bad, 1.0), negative | infinite),
    "scale": (lambda bad: sg.ShiftedExponential(0.0, bad), negative | zero | infinite),
    "minimum": (lambda bad: sg.Pareto(bad, 1.0), negative | zero | infinite),
    "shape": (lambda bad: sg.Pareto(1.0, bad), negative | zero | infinite),
    "median": (lambda bad: sg.LogNormal(bad, 1.0), negative | zero | infinite),
    "sigma": (lambda bad: sg.LogNormal(1.0, bad), negative | infinite),
    "workers_per_host": (
        lambda bad: sg.CorrelatedByHost(EXPONENTIAL, EXPONENTIAL, bad),
        too_few | st.just(0),
    ),
}
COUNTS = ["num_stragglers", "num_answers", "workers_per_host"]


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_values_are_named(name):
    build, bad_values = BAD_ARGUMENTS[name]

    @settings(deadline=None, max_examples=50)
    @given(bad_values)
    def check(bad):
        with pytest.raises(ValueError, match=rf"^{name} is .*; expected .+") as error:
            build(bad)
        assert repr(bad) in str(error.value)

    check()


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_wrong_types_are_named(name):
    build, _ = BAD_ARGUMENTS[name]

    @settings(deadline=None, max_examples=50)
    @given(wrong_types | st.floats() if name in COUNTS else wrong_types)
    def check(bad):
        with pytest.raises(WRONG_TYPE, match=name):
            build(bad)

    check()


@pytest.mark.parametrize("bad", [[], [0.1, np.nan], [0.1, -0.2], jnp.array([0.1, jnp.nan])])
def test_bad_samples_are_named(bad):
    with pytest.raises(ValueError, match=r"^samples.* (is|has shape) .*; expected .*: "):
        sg.Empirical(bad)


@pytest.mark.parametrize("bad", [0.1, np.ones((2, 1)), jnp.ones((1, 2)), "fast", None, [0.1, "fast"], [[0.1], 0.2]])
def test_samples_have_one_axis_of_numbers(unchecked, bad):
    with pytest.raises(ValueError, match=r"samples (is|has shape) .*; expected"):
        sg.Empirical(bad)


def test_samples_are_copied():
    measured = np.ones(3)
    latency = sg.Empirical(measured)
    measured[:] = 2
    assert (latency.sample(jax.random.key(0), 5) == 1).all()


@each_model
@pytest.mark.parametrize("num_workers", [0, -1])
def test_num_workers_is_at_least_one(model, num_workers):
    with pytest.raises(ValueError, match=rf"num_workers is {num_workers}; expected a whole number, at least 1"):
        model.sample(jax.random.key(0), num_workers)


@each_model
def test_num_workers_is_a_concrete_integer(model):
    with pytest.raises(WRONG_TYPE, match="num_workers"):
        model.sample(jax.random.key(0), 2.5)
    with pytest.raises(WRONG_TYPE, match="num_workers"):
        jax.jit(model.sample)(jax.random.key(0), 30)


@pytest.mark.parametrize(
    ("name", "model"),
    [("num_stragglers", sg.Uniform(40)), ("num_answers", sg.FirstToAnswer(EXPONENTIAL, jnp.asarray(40)))],
)
def test_more_than_all_workers_are_refused(name, model):
    with pytest.raises(ValueError, match=rf"{name} is .*40.*; expected .* at most num_workers=30: give 30"):
        model.sample(jax.random.key(0), num_workers=30)


def test_a_traced_count_must_still_be_an_integer():
    with pytest.raises(WRONG_TYPE, match="num_stragglers"):
        jax.jit(lambda count: sg.Uniform(count).sample(jax.random.key(0), 3))(1.5)
