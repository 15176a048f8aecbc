import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxcode as jc
from jaxcode import ReplicationCode, SplineCode, metrics, outputs, stragglers, tuning
from jaxcode.tuning import search
from jaxcode.tuning.evaluation import Curve, Judge, Model, squared_error

K, N, S = 5, 8, 2
LATE = stragglers.Uniform(S)
tune = functools.partial(tuning.tune, progress=False)


def inputs(size=60, seed=0, features=4):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(size, features)), jnp.float32)


WEIGHTS = jnp.asarray(np.random.default_rng(7).normal(size=(4, 3)), jnp.float32)


def smooth_classifier(x):
    return jnp.tanh(x @ WEIGHTS) @ jnp.eye(3)


def hash_classifier(x):
    """Classes that have nothing to do with where an input lies; between inputs, those of nothing."""
    return jnp.sin(1e4 * (x @ WEIGHTS))


def masks(count, seed=1):
    return jax.vmap(lambda k: LATE.sample(k, N))(jax.random.split(jax.random.key(seed), count))


def loss_of(predict, f, x):
    return np.mean([1 - float(metrics.agreement(predict(x, mask), f(x))) for mask in masks(40)])


@pytest.mark.long
def test_a_smooth_classifier_loses_far_less_than_replication():
    tuned = tune(smooth_classifier, inputs(), K, N, LATE)
    x = inputs(seed=1)
    loss = loss_of(tuned.coded(smooth_classifier), smooth_classifier, x)
    assert loss < 0.3 * loss_of(jc.coded(smooth_classifier, ReplicationCode(K, N)), smooth_classifier, x)
    assert tuned.order is not None


def test_a_model_without_any_smoothness_gets_copies():
    tuned = tune(hash_classifier, inputs(), K, N, LATE)
    if isinstance(tuned.code, SplineCode):
        assert np.isin(tuned.code.worker_nodes, tuned.code.data_nodes).all()
    x = inputs(seed=1)
    replication = loss_of(jc.coded(hash_classifier, ReplicationCode(K, N)), hash_classifier, x)
    assert loss_of(tuned.coded(hash_classifier), hash_classifier, x) <= replication + 1e-6


def test_the_reported_loss_is_what_the_tuned_code_loses():
    x = inputs()
    tuned = tune(smooth_classifier, x, K, N, LATE, orders={"as given": None}, key=jax.random.key(3), model_batch=7)
    predict = tuned.coded(smooth_classifier)
    drawn = jax.vmap(lambda k: LATE.sample(k, N))(jax.random.split(jax.random.key(3), 256))
    found = np.mean([1 - float(metrics.agreement(predict(x, mask), smooth_classifier(x))) for mask in drawn])
    np.testing.assert_allclose(tuned.candidates[0].loss, found, atol=1e-6)
    errors = [float(metrics.rmse(predict(x, mask), smooth_classifier(x))) for mask in drawn]
    np.testing.assert_allclose(tuned.candidates[0].rmse, np.sqrt(np.mean(np.square(errors))), rtol=1e-4)


def test_replication_is_measured_to_the_end_and_its_loss_is_what_it_loses():
    tuned = tune(smooth_classifier, inputs(), K, N, LATE)
    of_replication = [c for c in tuned.candidates if c.layout == "replication"]
    assert {c.num_groups for c in of_replication} == {12}
    lost = 1 - np.mean(jax.vmap(ReplicationCode(K, N).recovered)(masks(256, seed=0)))
    np.testing.assert_allclose([c.loss for c in of_replication], lost, atol=1e-6)


@pytest.mark.parametrize("probabilities", [True, False])
def test_a_classifier_is_decoded_from_logits(probabilities):
    def f(x):
        logits = 20 * x @ WEIGHTS
        return jax.nn.softmax(logits) if probabilities else logits

    layouts = {"Chebyshev": SplineCode.chebyshev(K, N)}
    tuned = tune(f, inputs(), K, N, LATE, layouts=layouts, orders={"as given": None})
    assert tuned.output is (outputs.logits if probabilities else outputs.as_returned)
    x = inputs(seed=1)
    results = tuned.coded(f)(x, masks(1)[0])
    if probabilities:
        np.testing.assert_allclose(results.sum(axis=1), 1, atol=1e-5)


def test_regression_by_squared_error_and_trees():
    def f(x):
        return {"sine": jnp.sin(x["a"]), "sum": x["a"].sum(axis=1) + x["b"]}

    def batch(seed):
        t = jnp.asarray(np.sort(np.random.default_rng(seed).uniform(-2, 2, 60)), jnp.float32)
        return {"a": jnp.stack([t, t**2], axis=1), "b": t}

    tuned = tune(f, batch(0), K, N, LATE)
    assert tuned.candidates[0].rmse < 0.1 * next(c.rmse for c in tuned.candidates if c.layout == "replication")
    results = tuned.coded(f)(batch(1), masks(1)[0])
    np.testing.assert_allclose(results["sum"], f(batch(1))["sum"], atol=0.1)


@pytest.mark.parametrize("layout", ["chebyshev", "repeated"])
@pytest.mark.parametrize("space", [outputs.as_returned, outputs.probabilities])
def test_the_error_has_derivatives_by_both_smoothings(layout, space):
    code = getattr(SplineCode, layout)(K, 20)
    rng = np.random.default_rng(0)
    x = {"a": rng.normal(size=(3, K, 4)).astype(np.float32), "b": rng.integers(0, 9, (3, K))}
    # More points than the model runs on at a time.
    model = Model(lambda _, x: jnp.tanh(x["a"] @ WEIGHTS) + 0.1 * x["b"][:, None], (), 7)
    targets = rng.normal(size=(3, K, 3)).astype(np.float32)
    drawn = jax.vmap(lambda key: LATE.sample(key, 20))(jax.random.split(jax.random.key(0), 8))
    judge = Judge(drawn, targets.reshape(-1, 3), squared_error, 5)

    def at(encoder, decoder):
        smooth = dataclasses.replace(code, encoder_smoothing=np.exp(encoder), decoder_smoothing=np.exp(decoder))
        curve = Curve(model, x, targets, code.data_nodes, smooth.encoder_smoothing)
        return smooth, curve, curve.answers(code.worker_nodes, 3)

    def square(*logs):
        smooth, _, answers = at(*logs)
        return judge(smooth, [space], answers, targets)[0].rmse ** 2

    for encoder, decoder in ((-5.0, -9.0), (-8.0, -6.0)):
        smooth, curve, answers = at(encoder, decoder)
        found, by_decoder, by_answers = judge.slopes(smooth, space, answers, targets)
        assert found == pytest.approx(square(encoder, decoder), rel=1e-5)
        slope = (square(encoder, decoder + 0.05) - square(encoder, decoder - 0.05)) / 0.1
        assert by_decoder == pytest.approx(slope, rel=0.02)
        slope = (square(encoder + 0.05, decoder) - square(encoder - 0.05, decoder)) / 0.1
        assert curve.slope(code.worker_nodes, by_answers) == pytest.approx(slope, rel=0.02)


def test_noisy_answers_are_smoothed():
    noise = jnp.asarray(np.random.default_rng(0).normal(size=997), jnp.float32)

    def f(x):
        # A new number for every input, as noise is, and the same for the same input.
        return jnp.sin(x) + 0.3 * noise[jnp.abs(x * 1e5).astype(jnp.int32) % 997]

    x = jnp.linspace(0, 3, 80)[:, None]
    layouts = {"Chebyshev": SplineCode.chebyshev(K, 40)}
    tuned = tune(f, x, K, 40, LATE, layouts=layouts, orders={"as given": None})
    assert tuned.code.decoder_smoothing > 0

    def rmse(code):
        predict = jc.coded(f, code)
        return np.mean([float(metrics.rmse(predict(x, mask), jnp.sin(x))) for mask in drawn])

    drawn = jax.vmap(lambda k: LATE.sample(k, 40))(jax.random.split(jax.random.key(5), 10))
    assert rmse(tuned.code) < 0.7 * rmse(layouts["Chebyshev"])


def test_both_smoothings_are_found_by_gradient(monkeypatch):
    """Sixteen rough inputs for sixteen workers of which six are late: a curve that is less rough does better."""
    t = np.tile(np.linspace(0, 3, 16), 30)
    x = jnp.asarray(np.stack([t, np.random.default_rng(0).normal(size=t.shape)], axis=1), jnp.float32)
    code = SplineCode.chebyshev(16, 16, encoder_smoothing=16.0**-4)

    def tuned(f):
        layouts = {"too smooth": code}
        return tune(f, x, 16, 16, stragglers.Uniform(6), layouts=layouts, orders={"as given": None})

    def f(x):
        return jnp.sin(x[:, :1]) + x[:, 1:] ** 2

    def without_derivatives(x):
        return jax.pure_callback(f, jax.ShapeDtypeStruct((x.shape[0], 1), x.dtype), x, vmap_method="sequential")

    def in_units(tuned):
        return np.array([tuned.code.encoder_smoothing, tuned.code.decoder_smoothing]) * 16**4

    fine = tuned(f)
    monkeypatch.setattr(search, "_SMOOTHINGS", (0.03, 0.6))
    by_gradient, by_grid = tuned(f), tuned(without_derivatives)
    assert in_units(by_grid)[0] == pytest.approx(0.03)
    assert 0.04 < in_units(by_gradient)[0] < 0.3
    error, of_fine, of_grid = (found.candidates[0].rmse for found in (by_gradient, fine, by_grid))
    assert error < of_grid
    assert error < 1.001 * of_fine
    drawn = jax.vmap(lambda k: stragglers.Uniform(6).sample(k, 16))(jax.random.split(jax.random.key(0), 256))
    predict = by_gradient.coded(f)
    errors = [float(metrics.rmse(predict(x, mask), f(x))) for mask in drawn]
    assert error == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-4)


def test_ones_own_loss_orders_and_layouts():
    def largest_error(estimates, targets):
        return jnp.max(jnp.abs(estimates - targets))

    def backwards(x, num_data):
        return jnp.arange(x.shape[0])[::-1]

    layouts = {"one": SplineCode.systematic(K, N)}
    x = jnp.linspace(0, 3, 40)[:, None]
    tuned = tune(jnp.sin, x, K, N, LATE, loss=largest_error, layouts=layouts, orders={"backwards": backwards})
    assert [(c.layout, c.order) for c in tuned.candidates] == [("one", "backwards")]
    assert tuned.order is backwards
    drawn = jax.vmap(lambda k: LATE.sample(k, N))(jax.random.split(jax.random.key(0), 256))
    predict = tuned.coded(jnp.sin)
    errors = [np.abs(predict(x, mask) - np.sin(x)).reshape(-1, K).max(axis=1).mean() for mask in drawn[:64]]
    np.testing.assert_allclose(tuned.candidates[0].loss, np.mean(errors), rtol=0.3)


def test_flax_models():
    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3)(x)

    module = Linen()
    layouts = {"repeated": SplineCode.repeated(K, N)}
    for f in (nnx.Linear(4, 3, rngs=nnx.Rngs(0)), (module, module.init(jax.random.key(0), inputs()))):
        tuned = tune(f, inputs(), K, N, LATE, layouts=layouts)
        assert tuned.coded(f)(inputs(7), masks(1)[0]).shape == (7, 3)


def test_fewer_workers_than_inputs():
    tuned = tune(jnp.sin, jnp.linspace(0, 3, 20)[:, None], 8, 6, stragglers.Uniform(1), orders={"own": None})
    assert isinstance(tuned.code, SplineCode)


def test_the_model_runs_once_for_what_several_candidates_ask():
    model = Model(lambda _, x: x**2, (), 12)
    x = np.asarray(inputs(12)).reshape(3, 4, 4)
    curve = Curve(model, x, x**2, np.array([-1.0, 0.0, 0.5, 1.0]))
    curve.answers(np.array([-1.0, 0.0, 0.0, 1.0]), 3)
    assert model.count == 0
    curve.answers(np.array([-0.5, 0.0, 0.7]), 2)
    assert model.count == 4
    answers = curve.answers(np.array([-0.5, 0.2, 0.7]), 3)
    assert model.count == 4 + 2 + 3
    code = SplineCode(curve.data_nodes, np.array([-0.5, 0.2, 0.7]))
    expected = jnp.stack([code.encode(jnp.asarray(group)) ** 2 for group in x])
    np.testing.assert_allclose(answers, expected, rtol=1e-5, atol=1e-6)


def test_the_report(tmp_path, capsys):
    tuned = tuning.tune(smooth_classifier, inputs(), K, N, LATE)
    assert "candidate" in capsys.readouterr().err
    lines = tuned.table().splitlines()
    assert len(lines) == len(tuned.candidates) + 1 == 3 * len(tuning.standard_layouts(K, N)) + 1
    assert lines[1].startswith(tuned.candidates[0].layout)
    assert f"{tuned.candidates[0].loss:.4f}" in lines[1]
    assert str(tuned.num_evaluations) in str(tuned).replace(",", "")
    tuned.plot(tmp_path / "tuned.png")
    assert (tmp_path / "tuned.png").stat().st_size > 1000


WRONG = {
    "short": ({"x_sample": inputs(9)}, "x_sample has 9 inputs.*at least two groups.*10"),
    "K": ({"num_data": 1}, "num_data is 1"),
    "stragglers": ({"stragglers": 2}, "stragglers is 2; expected a model such as"),
    "sizes": ({"layouts": {"a": SplineCode.repeated(4, 8)}}, "layouts\\['a'\\].*4 inputs for 8 workers.*5 and 8"),
    "kind": ({"layouts": {"a": jc.BerrutCode.chebyshev(5, 8)}}, "layouts\\['a'\\].*expected a SplineCode"),
    "none": ({"orders": {}}, "orders 0 entries"),
}


@pytest.mark.parametrize(("argument", "message"), WRONG.values(), ids=WRONG)
def test_bad_arguments(unchecked, argument, message):
    arguments = {"x_sample": inputs(), "num_data": K, "num_workers": N, "stragglers": LATE} | argument
    with pytest.raises(ValueError, match=message):
        tune(smooth_classifier, **arguments)


# ---- optimise_nodes ----------------------------------------------------------------------------------------


def expected_variance(code, seed=9):
    """The posterior variance of a brute-force Gaussian process, a mean over straggler sets and inputs."""
    found = []
    for mask in np.asarray(masks(100, seed)):
        t, at = code.worker_nodes[mask].astype(np.longdouble), code.data_nodes

        # Vague straight lines and an integrated Wiener process that begins at the left.
        def kernel(s, t):
            low, high = np.minimum(s[:, None], t) + 1, np.maximum(s[:, None], t) + 1
            return low**2 * (3 * high - low) / 6 + 1e4 * (1 + s[:, None] * t)

        between = np.linalg.solve(np.float64(kernel(t, t)) + 1e-9 * np.eye(len(t)), np.float64(kernel(t, at)))
        found.append(np.mean(np.diagonal(kernel(at, at)) - np.sum(kernel(t, at) * between, axis=0)))
    return float(np.mean(found))


def test_nodes_move_to_where_the_posterior_varies_less():
    code = SplineCode.chebyshev(K, N)
    moved = tuning.optimise_nodes(code, LATE, steps=40, progress=False)
    assert expected_variance(moved) < 0.8 * expected_variance(code)
    assert (np.diff(moved.worker_nodes) >= 0).all()
    np.testing.assert_array_equal(moved.data_nodes, code.data_nodes)


@pytest.mark.long
def test_nodes_move_to_where_a_model_errs_less():
    x = jnp.linspace(-2, 2, 2 * K)[:, None]
    code = SplineCode.chebyshev(K, N)

    def f(x):
        return x * jnp.sin(3 * x)

    moved = tuning.optimise_nodes(code, LATE, f=f, x_sample=x, steps=40, progress=False)

    def rmse(code):
        predict = jc.coded(f, code)
        return np.sqrt(np.mean([float(metrics.rmse(predict(x, m), f(x))) ** 2 for m in masks(40)]))

    assert rmse(moved) < 0.9 * rmse(code)


def test_without_a_step_the_code_is_the_same():
    code = SplineCode.chebyshev(K, N)
    assert tuning.optimise_nodes(code, LATE, steps=0, progress=False) is code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"code": ReplicationCode(K, N)}, "code is .* expected a SplineCode"),
        ({"f": jnp.sin}, "f and x_sample go together"),
        ({"f": jnp.sin, "x_sample": inputs(3)}, "at least num_data, 5"),
        ({"code": SplineCode(np.arange(5.0), np.arange(8.0))}, "expected nodes on"),
    ],
)
def test_nodes_that_cannot_be_moved(unchecked, arguments, message):
    with pytest.raises(ValueError, match=message):
        tuning.optimise_nodes(**({"code": SplineCode.chebyshev(K, N), "stragglers": LATE} | arguments), progress=False)
