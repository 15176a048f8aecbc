"""What surrogates learn, what they cost, and how well they know their errors."""

import chex
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats
from sklearn import linear_model

import jaxcode as jc
from jaxcode.surrogates import students
from jaxcode.surrogates.augmentation import augment, natural_changes
from jaxcode.surrogates.calibration import calibrate_disagreement, calibrate_squared_error
from jaxcode.surrogates.features import average_parts
from jaxcode.surrogates.ridge import fit_ridge

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(900, 4)).astype(np.float32)
DIRECTIONS = RNG.normal(size=(4, 5)).astype(np.float32)


def classify(x):
    """A model of vectors of four numbers that expects a thousand times the work of the network that it is."""
    return jnp.tanh(x @ DIRECTIONS) @ (2 * jnp.eye(5)) + jnp.sin(3 * x[:, :1])


def recognise(images):
    """A model of images: how bright each quarter is, and how the brightness changes."""
    return average_parts(jnp.asarray(images), 2)[:, :4] * jnp.array([4.0, -4.0, 2.0, 1.0])


@pytest.fixture(scope="module")
def prior():
    return jc.surrogate(classify, VECTORS, cost=300.0, progress=False)


def test_ridge_regression_leaves_out_as_refitting_does():
    features, targets = RNG.normal(size=(40, 6)), RNG.normal(size=(40, 2))
    targets += features[:, :2]
    fit = fit_ridge(features, targets)
    scale = features.std(axis=0)
    penalty = fit.ridge * 40 * 6
    everything = linear_model.Ridge(penalty).fit(features / scale, targets)
    np.testing.assert_allclose(fit.weights, (everything.coef_ / scale).T, rtol=1e-6)
    np.testing.assert_allclose(fit.offset, everything.intercept_, rtol=1e-6)
    for row in (0, 17):
        others = np.arange(40) != row
        refit = linear_model.Ridge(penalty).fit(features[others] / scale, targets[others])
        np.testing.assert_allclose(fit.left_out[row], refit.predict(features[row : row + 1] / scale)[0], rtol=1e-6)


def test_ridge_regression_with_more_features_than_rows():
    features, targets = RNG.normal(size=(20, 50)), RNG.normal(size=(20, 1))
    fit = fit_ridge(features, targets)
    expected = linear_model.Ridge(fit.ridge * 20 * 50).fit(features / features.std(axis=0), targets)
    np.testing.assert_allclose(
        features @ fit.weights + fit.offset, expected.predict(features / features.std(axis=0)).reshape(-1, 1), rtol=1e-6
    )


def test_guesses_are_near_the_models_answers(prior):
    x = np.random.default_rng(5).normal(size=(500, 4)).astype(np.float32)
    truth = classify(x)
    assert jnp.mean(jnp.square(prior(x) - truth)) < 0.1 * jnp.var(truth)
    assert jc.metrics.agreement(prior(x), truth) > 0.85


def test_the_expected_losses_are_those_found(prior):
    """On inputs that nothing was fitted to, all together and in the riskier half."""
    x = np.random.default_rng(6).normal(size=(4000, 4)).astype(np.float32)
    truth = np.asarray(classify(x))
    guesses, risk = prior.with_risk(x, "disagreement")
    wrong = np.argmax(guesses, 1) != truth.argmax(1)
    # Of two hundred inputs held out, four per cent are wrong with a standard error of .014.
    assert abs(risk.mean() - wrong.mean()) < 0.04
    is_riskier = np.asarray(risk > np.median(risk))
    assert wrong[is_riskier].mean() > 3 * wrong[~is_riskier].mean()
    guesses, risk = prior.with_risk(x, "squared_error")
    squares = np.mean(np.square(guesses - truth), axis=1)
    # One input in a hundred, far from all others, has most of the squared error, and two hundred are held out.
    typical = np.asarray(risk <= np.quantile(risk, 0.9))
    assert 0.25 < risk[typical].mean() / squares[typical].mean() < 4
    assert stats.spearmanr(risk, squares).statistic > 0.5
    is_riskier = np.asarray(risk > np.median(risk))
    assert squares[is_riskier].mean() > 1.3 * squares[~is_riskier].mean()


def test_a_linear_model_is_guessed_exactly():
    prior = jc.surrogate(lambda x: x @ DIRECTIONS, VECTORS[:200], cost=50.0, progress=False)
    np.testing.assert_allclose(prior(VECTORS), VECTORS @ DIRECTIONS, atol=1e-3)


def test_images_are_guessed():
    images = RNG.uniform(size=(700, 12, 12, 1)).astype(np.float32) * RNG.uniform(size=(700, 1, 1, 1)).astype(np.float32)
    expensive = nnx.Conv(1, 64, (5, 5), rngs=nnx.Rngs(0))

    def model(images):
        return recognise(images) + 1e-6 * expensive(images).sum(axis=(1, 2))[:, :4]

    prior = jc.surrogate(model, images[:600], cost=0.05, progress=False)
    assert prior.cost < 0.07
    truth = model(images[600:])
    assert jnp.mean(jnp.square(prior(images[600:]) - truth)) < 0.2 * jnp.var(truth)


def test_few_images_are_guessed_by_ridge_regression():
    images = RNG.uniform(size=(150, 12, 12, 1)).astype(np.float32)
    prior = jc.surrogate(recognise, images, cost=200.0, progress=False)
    assert type(prior.predictor).__name__ == "LinearPredictor"
    chex.assert_tree_all_finite(prior(images))


def test_features_may_be_the_models_own_first_layers():
    hidden = nnx.Linear(4, 16, rngs=nnx.Rngs(0))
    head = nnx.Linear(16, 3, rngs=nnx.Rngs(1))
    prior = jc.surrogate(lambda x: head(hidden(x)), VECTORS[:100], features=hidden, progress=False)
    np.testing.assert_allclose(prior(VECTORS), head(hidden(VECTORS)), atol=1e-3)


def test_a_network_of_the_users_own_is_trained_by_distillation():
    network = nnx.Sequential(nnx.Linear(4, 32, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(32, 5, rngs=nnx.Rngs(1)))
    before = jax.tree.map(jnp.copy, nnx.state(network))
    prior = jc.surrogate(classify, VECTORS, model=network, progress=False)
    chex.assert_trees_all_equal(nnx.state(network), before)
    truth = classify(VECTORS)
    assert jnp.mean(jnp.square(prior(VECTORS) - truth)) < 0.2 * jnp.var(truth)


def test_answers_may_be_a_tree_of_several_dtypes():
    def model(x):
        return {"mean": x["a"] * 2, "rest": (x["b"].sum(axis=1).astype(jnp.bfloat16),)}

    x = {"a": VECTORS[:, :2], "b": VECTORS[:, 2:].reshape(-1, 1, 2)}
    guesses = jc.surrogate(
        lambda x: {**model(x), "rest": (model(x)["rest"][0].sum(axis=1),)}, x, cost=99.0, progress=False
    )(x)
    assert guesses["rest"][0].dtype == jnp.bfloat16
    assert guesses["mean"].shape == (900, 2)
    np.testing.assert_allclose(guesses["mean"], x["a"] * 2, atol=0.1)


def test_linen_models_have_surrogates():
    module = linen.Dense(3)
    variables = module.init(jax.random.key(0), VECTORS[:1])
    prior = jc.surrogate((module, variables), VECTORS[:100], cost=9.0, progress=False)
    np.testing.assert_allclose(prior(VECTORS), module.apply(variables, VECTORS), atol=1e-3)


def test_the_cost_is_the_compilers(prior):
    def flops(f):
        analysis = jax.jit(f).lower(VECTORS[:16]).cost_analysis()
        return analysis["flops"] + analysis["transcendentals"]

    np.testing.assert_allclose(prior.cost, flops(lambda x: prior.predictor(x)) / flops(classify), rtol=0.01)


def test_surrogates_are_pytrees_and_differentiable(prior):
    chex.assert_trees_all_equal(jax.jit(lambda prior, x: prior(x))(prior, VECTORS), jax.jit(prior)(VECTORS))
    slopes = jax.grad(lambda prior: jnp.sum(prior(VECTORS)))(prior)
    chex.assert_tree_all_finite(slopes)
    chex.assert_tree_all_finite(jax.jacfwd(lambda x: prior.with_risk(x)[1])(VECTORS[:3]))


def test_seeds_repeat():
    first, again, other = (
        jc.surrogate(classify, VECTORS[:100], cost=300.0, seed=seed, progress=False)(VECTORS) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_only_natural_changes_of_images_are_learned():
    """Of a model that tells left from right, images are not mirrored; all answers are the model's own."""
    images = RNG.uniform(size=(300, 8, 8, 1)).astype(np.float32)
    images[:, :, :4] *= RNG.uniform(size=(300, 1, 1, 1)).astype(np.float32)

    def brightness(images):
        return np.asarray(images.mean(axis=(1, 2)))

    def side(images):
        return brightness(images[:, :, :4]) - brightness(images[:, :, 4:])

    def augmented(f):
        rng = np.random.default_rng(0)
        changes = natural_changes(images, f(images), f, rng)
        return augment(images, f(images), f, changes, 500, rng)

    more, answers = augmented(brightness)
    assert len(more) == 800
    np.testing.assert_array_equal(answers, brightness(more))
    more, answers = augmented(side)
    np.testing.assert_array_equal(answers, side(more))
    assert np.mean(answers[300:]) == pytest.approx(np.mean(answers[:300]), abs=0.1)


def test_sequences_are_found_among_the_leaves_of_inputs():
    ids, mask = RNG.integers(2, 50, size=(30, 6)), np.ones((30, 6), np.int32)
    tree = {"query": {"ids": ids, "kind": mask, "mask": mask}, "text": {"ids": ids, "kind": mask, "mask": mask}}
    assert students.find_sequences(tree) == ((0, (1, 2)), (3, (4, 5)))
    # A mask belongs to tokens of its shape; where there are none, it is a sequence itself.
    assert students.find_sequences((ids[:, :4], ids, mask > 0)) == ((0, ()), (1, (2,)))
    assert students.find_sequences((ids, mask[:, :3], np.ones((30, 3)))) == ((0, ()), (1, ()))
    assert students.find_sequences((ids, ids[:, 0], mask[:, 0], ids * 10**6)) == ((0, ()), (1, (2,)))
    assert students.has_tokens(ids)
    assert not students.has_tokens(ids * 10**6)
    assert not students.has_tokens({"class": ids[:, 0], "numbers": np.ones((30, 2))})


def test_new_pairs_are_learned_if_their_answers_are_like_those_of_others():
    """The sequences of a pair stay whole, and a model that expects certain pairs gets no others."""
    query = RNG.integers(2, 50, size=(300, 4))
    pairs = {"document": query[:, :3] + RNG.integers(2, size=(300, 1)), "query": query, "weight": np.arange(300.0)}

    def likeness(pairs):
        return np.float32(np.abs(pairs["document"] - pairs["query"][:, :3]).sum(axis=1, keepdims=True))

    def first(pairs):
        return np.float32(pairs["document"][:, :1])

    rng = np.random.default_rng(0)
    assert natural_changes(pairs, likeness(pairs), likeness, rng) == []
    changes = natural_changes(pairs, first(pairs), first, rng)
    more, answers = augment(pairs, first(pairs), first, changes, 200, rng)
    np.testing.assert_array_equal(answers, first(more))
    rows = {tuple(row) for row in query}
    assert {tuple(row) for row in more["query"]} == rows
    likely = likeness(more)
    assert likely[300:].mean() > 3 * likely[:300].mean()


def test_calibration_recovers_known_probabilities():
    margin = RNG.uniform(0, 4, size=20_000)
    wrong = RNG.random(20_000) < np.exp(-margin) / 2
    guesses = np.stack([margin, np.zeros_like(margin)], axis=1)
    answers = np.where(wrong[:, None], [[0.0, 1.0]], [[1.0, 0.0]])
    risk = calibrate_disagreement(guesses, answers)
    np.testing.assert_allclose(risk(-np.array([0.5, 1.0, 2.0])), np.exp([-0.5, -1.0, -2.0]) / 2, atol=0.03)
    assert np.all(np.diff(risk(-np.linspace(0, 4, 50))) <= 0)


def test_calibration_recovers_known_squared_errors():
    scale = RNG.uniform(-2, 2, size=20_000)
    squares = (np.exp(scale) * RNG.normal(size=20_000)) ** 2
    risk = calibrate_squared_error(2 * scale + 7, squares)
    np.testing.assert_allclose(risk(np.array([6.0, 7.0, 8.0])), np.exp([-1.0, 0.0, 1.0]), rtol=0.15)


@pytest.mark.usefixtures("unchecked")
def test_arguments_that_do_not_fit_are_refused(prior):
    with pytest.raises(ValueError, match="cost is 0"):
        jc.surrogate(classify, VECTORS, cost=0)
    with pytest.raises(ValueError, match="inputs has 19 inputs; expected at least 20"):
        jc.surrogate(classify, VECTORS[:19])
    with pytest.raises(ValueError, match="dtype int32; expected floating-point"):
        jc.surrogate(lambda x: jnp.argmax(x, axis=1).astype(jnp.int32), VECTORS)
    with pytest.raises(ValueError, match="loss is 'accuracy'"):
        prior.with_risk(VECTORS, "accuracy")
    with pytest.raises(ValueError, match=r"features returned 2 rows for a batch of"):
        jc.surrogate(classify, VECTORS, features=lambda x: x[:2], progress=False)
