"""What all models of stragglers and of latencies share: transformations, modes of JAX, and refused arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcode import stragglers as sg

from ..strict_modes import STRICT_MODES
from .cases import EXPONENTIAL, LATENCIES, WRONG_TYPE

MODELS = {
    "uniform": sg.Uniform(5),
    "independent": sg.Independent(0.2),
    "first": sg.FirstToAnswer(EXPONENTIAL, 25),
    "deadline": sg.Deadline(sg.LogNormal(0.1, 0.5), 0.15),
    "first by host": sg.FirstToAnswer(sg.CorrelatedByHost(EXPONENTIAL, EXPONENTIAL, 4), 25),
    "empirical": sg.Empirical([0.1, 0.2, 0.2, 3.0]),
} | {name: model for name, (model, _) in LATENCIES.items()}

each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


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


# ---- arguments ---------------------------------------------------------------------------------------------

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
