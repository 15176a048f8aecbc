import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcode as jc
from jaxcode import stragglers
from jaxcode.functions import as_pure_function
from jaxcode.training.objective import Objective
from jaxcode.training.parameters import code_parameters, prior_parameters
from jaxcode.training.refinement import _is_better

K, N, LATE = 6, 9, stragglers.Uniform(2)
refine = functools.partial(jc.training.refine, progress=False)


def uneven(x):
    """Depends on one direction far more than on others, which is none of the axes."""
    return jnp.stack([jnp.sin(4 * (x[:, 0] + x[:, 1])), jnp.cos(3 * (x[:, 0] + x[:, 1])) + 0.1 * x[:, 2]], axis=1)


def inputs(count, seed=0, features=3):
    return np.random.default_rng(seed).uniform(size=(count, features)).astype(np.float32)


def mean_squared_error(code, f, x, num_sets=16):
    """Of requests of K inputs each."""
    masks = jax.vmap(lambda key: LATE.sample(key, N))(jax.random.split(jax.random.key(7), num_sets))
    predict, requests = jc.coded(f, code), jnp.asarray(x).reshape(-1, K, x.shape[1])
    results = jax.jit(jax.vmap(jax.vmap(predict, (None, 0)), (0, None)))(requests, masks)
    return float(jnp.mean(jnp.square(results - jax.vmap(f)(requests)[:, None])))


@pytest.fixture(scope="module")
def refined():
    return refine(uneven, jc.KernelCode(K, N), inputs(40 * K), LATE, steps=60)


def test_on_other_inputs_a_refined_code_loses_less(refined):
    x = inputs(12 * K, seed=1)
    errors = [mean_squared_error(code, uneven, x) for code in (refined.code, jc.KernelCode(K, N))]
    assert refined.is_better
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.long
def test_on_other_inputs_a_refined_code_loses_less_than_what_tuning_chooses(refined):
    tuned = jc.tune(uneven, inputs(40 * K), K, N, LATE, orders={"as given": None}, num_masks=32, progress=False)
    x = inputs(30 * K, seed=1)
    assert mean_squared_error(refined.code, uneven, x) < 0.5 * mean_squared_error(tuned.code, uneven, x)


def test_the_metric_finds_the_direction_that_counts(refined):
    metric = np.asarray(refined.code.metric)
    ahead, across = (np.linalg.norm(np.array(direction) @ metric) for direction in ([1, 1, 0], [1, -1, 0]))
    assert across < 0.3 * ahead


def test_what_is_not_better_is_not_kept():
    x = inputs(200)
    prior = jc.surrogate(uneven, x[:100], cost=30.0, progress=False)
    code = jc.ReplicationCode(K, N)
    kept = refine(uneven, code, x, LATE, prior=prior, steps=1)
    assert not kept.is_better
    assert kept.code is code
    assert kept.prior is prior
    assert "not kept" in str(kept)


def test_nodes_and_smoothing_move():
    def bent(x):
        return jnp.abs(x - 0.3) + x * jnp.sin(8 * x)

    x = np.linspace(0, 1, 16 * K, dtype=np.float32).reshape(K, 16).T.reshape(-1, 1)
    result = refine(bent, jc.SplineCode.systematic(K, N, 1e-4, 1e-4), x, LATE, steps=60)
    assert result.is_better
    assert result.after < 0.9 * result.before
    alpha, beta = result.code.nodes.data, result.code.nodes.workers
    assert isinstance(alpha, np.ndarray)
    # Workers of inputs stay at their nodes.
    assert np.isin(alpha, beta).all()


def objective(f, code):
    fn, params = as_pure_function(f)
    computed = Objective(fn, None, jc.outputs.as_returned, "squared_error", None, 1.0)

    def measure(code, prior, x, masks):
        return computed.trained(code, prior, params, jnp.asarray(x), f(jnp.asarray(x)), masks)

    return measure


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(jc.SplineCode.systematic(K, N, 0.0, 1e-3), marks=pytest.mark.long),
        pytest.param(jc.SplineCode.chebyshev(K, N, 1e-3, 1e-3), marks=pytest.mark.long),
        pytest.param(jc.BerrutCode.chebyshev(K, N), marks=pytest.mark.long),
        pytest.param(jc.KernelCode(K, N), marks=pytest.mark.long),
        jc.KernelCode(K, N, mixes=False),
    ],
    ids=["systematic", "Chebyshev", "Berrut", "kernel", "kernel, copies"],
)
def test_gradients_are_those_of_finite_differences(code):
    with jax.enable_x64(True):
        x = np.float64(inputs(K, seed=3))
        masks = jnp.asarray(np.random.default_rng(1).permuted(np.arange(N)[None].repeat(4, 0) > 1, axis=1))
        parameters = code_parameters(code, lambda: x)
        start = parameters.starts[len(parameters.starts) // 3]
        measure = objective(uneven, code)

        def loss(values):
            code = parameters.build(values, start, jnp)
            return jnp.log(jnp.mean(measure(code, None, x, masks)))

        rng = np.random.default_rng(0)
        # Away from zero, where coded inputs of kernel codes are chosen anew only at distances between nodes.
        values = jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.01 * rng.normal(size=leaf.shape)), parameters.values)
        direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), values)

        compute = jax.jit(jax.value_and_grad(loss))

        def along(step):
            return compute(jax.tree.map(lambda value, slope: value + step * slope, values, direction))[0]

        gradients = compute(values)[1]
        chex.assert_tree_all_finite(gradients)
        slope = sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), gradients, direction)))
        difference = (along(1e-5) - along(-1e-5)) / 2e-5
        np.testing.assert_allclose(slope, difference, rtol=1e-3, atol=1e-6)
        assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradients))


def test_training_starts_from_the_code_itself():
    code = jc.SplineCode.systematic(K, N, 1e-6, 1e-5)
    parameters = code_parameters(code, lambda: None)
    same = parameters.build(parameters.values, (), np)
    chex.assert_trees_all_close(same, code, rtol=1e-12, atol=1e-12)


def classifier(seed=0):
    return nnx.Sequential(nnx.Linear(4, 64, rngs=nnx.Rngs(seed)), nnx.tanh, nnx.Linear(64, 3, rngs=nnx.Rngs(seed + 1)))


@pytest.mark.parametrize("kind", ["network", "ridge"])
@pytest.mark.parametrize("loss", ["squared_error", "disagreement"])
def test_priors_of_flax_models(kind, loss):
    model, x = classifier(), 4 * inputs(600, features=4) - 2
    student = nnx.Linear(4, 3, rngs=nnx.Rngs(3))
    prior = jc.surrogate(model, x[:40], model=student if kind == "network" else None, cost=10.0, progress=False)
    if kind == "network":
        # Not trained yet.
        state = jax.tree.map(jnp.zeros_like, prior.predictor.params)
        prior = dataclasses.replace(prior, predictor=dataclasses.replace(prior.predictor, params=state))
    result = refine(model, jc.ReplicationCode(K, N), x, LATE, prior=prior, loss=loss, batch_size=4 * K, steps=200)
    assert result.stragglers is LATE
    if kind == "network":
        assert result.is_better
        assert result.after < 0.8 * result.before
    predict = result.coded(model)
    assert jnp.isfinite(predict(x[:20], jnp.arange(N) > 2)).all()


def test_a_prior_and_a_code_that_mixes_are_trained_together():
    x = inputs(24 * K)
    prior = jc.surrogate(uneven, x, cost=30.0, progress=False)
    moved = prior_parameters(prior)
    code = jc.SplineCode.systematic(K, N, 0.0, 1e-3)
    measure = objective(uneven, code)

    def loss(values):
        prior = moved.build(values, (), jnp)
        return jnp.mean(measure(code, prior, x[:K], jnp.arange(N)[None] != jnp.array([[3], [5]])))

    gradients = jax.jit(jax.grad(loss))(moved.values)
    chex.assert_tree_all_finite(gradients)
    assert any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradients))


def test_what_is_better_by_chance_is_not_kept():
    rng = np.random.default_rng(0)
    # A few groups have most of the loss, so that the mean's standard error is as large as the mean.
    heavy, noise = (rng.lognormal(0.0, sigma, size=(1, 10)) * np.ones((8, 1)) for sigma in (3.0, 0.3))
    assert heavy.mean() < 2 * heavy.std(ddof=1) / 10**0.5
    assert _is_better(heavy, 0.3 * heavy * noise)
    assert not _is_better(heavy, heavy * noise / noise.mean())
    assert not _is_better(noise, noise[:, ::-1])
    # Most groups lose less, but the mean is larger.
    assert not _is_better(heavy, np.where(heavy == heavy.max(), 2 * heavy, 0.3 * heavy))
    for lost in (np.nan, np.inf):
        assert not _is_better(np.where(heavy == heavy.max(), lost, heavy), heavy)


def test_trained_codes_are_saved(refined, tmp_path):
    from jaxcode import _storage

    _storage.save(tmp_path / "code.safetensors", refined.code)
    same = _storage.load(tmp_path / "code.safetensors", jc.KernelCode, {})
    x, returned = inputs(K), np.arange(N) != 4
    chex.assert_trees_all_equal(jc.coded(uneven, same)(x, returned), refined.coded(uneven)(x, returned))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"code": jc.ReplicationCode(K, N)}, "no parameters to train"),
        ({"code": None}, "code is None"),
        ({"inputs": inputs(2 * K)}, "at least four batches"),
        ({"loss": "accuracy"}, "loss is 'accuracy'"),
        ({"loss": "disagreement", "f": lambda x: x[:, 0]}, "expected class scores"),
        ({"batch_size": 2}, "batch_size is 2"),
        ({"stragglers": None}, "stragglers is None"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_arguments_that_make_no_sense(unchecked, arguments, message):
    defaults = {"f": uneven, "code": jc.KernelCode(K, N), "inputs": inputs(4 * K), "stragglers": LATE}
    with pytest.raises(ValueError, match=message):
        refine(**(defaults | arguments))
