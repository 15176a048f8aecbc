import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxcode as jc
from jaxcode import ReplicationCode, SplineCode, linops, metrics, outputs, stragglers, tuning
from jaxcode.tuning import trials

from .cases import (
    LATE,
    WEIGHTS,
    K,
    N,
    hash_classifier,
    inputs,
    mean_loss,
    root_mean_square,
    sample_masks,
    smooth_classifier,
    tune,
    tune_classes,
)


@pytest.mark.long
def test_a_smooth_classifier_loses_far_less_than_replication():
    tuned = tune_classes(smooth_classifier, inputs(), K, N, LATE)
    x, masks = inputs(seed=1), sample_masks(40)
    replication = jc.coded(smooth_classifier, ReplicationCode(K, N))
    loss = mean_loss(tuned.coded(smooth_classifier), smooth_classifier, x, masks)
    assert loss < 0.3 * mean_loss(replication, smooth_classifier, x, masks)
    assert tuned.order is not None


def test_a_model_without_any_smoothness_gets_copies():
    tuned = tune_classes(hash_classifier, inputs(), K, N, LATE)
    if tuned.code.nodes is not None:
        assert np.isin(tuned.code.nodes.workers, tuned.code.nodes.data).all()
    x, masks = inputs(seed=1), sample_masks(40)
    replication = jc.coded(hash_classifier, ReplicationCode(K, N))
    loss = mean_loss(tuned.coded(hash_classifier), hash_classifier, x, masks)
    assert loss <= mean_loss(replication, hash_classifier, x, masks) + 1e-6


def test_replication_is_chosen_unless_another_loses_less():
    tuned = tune_classes(smooth_classifier, inputs(), K, N, stragglers.Uniform(0))
    assert tuned.code == ReplicationCode(K, N)
    assert tuned.candidates[0].layout == "replication"
    # Repeated nodes lose nothing either when every worker returns; a loss is never rounded to below zero.
    assert tuned.candidates[1].loss == tuned.candidates[0].loss == 0


def test_the_reported_loss_is_that_of_the_tuned_code():
    x = inputs()
    tuned = tune_classes(
        smooth_classifier,
        x,
        K,
        N,
        LATE,
        layouts=tuning.standard_layouts(K, N),
        orders={"as given": None},
        key=jax.random.key(3),
        model_batch=7,
    )
    predict, masks = tuned.coded(smooth_classifier), sample_masks(256, seed=3)
    np.testing.assert_allclose(tuned.candidates[0].loss, mean_loss(predict, smooth_classifier, x, masks), atol=1e-6)
    np.testing.assert_allclose(
        tuned.candidates[0].rmse, root_mean_square(predict, smooth_classifier, x, masks), rtol=1e-4
    )


def test_replication_is_measured_on_all_groups_and_its_loss_is_the_share_of_lost_inputs():
    tuned = tune_classes(smooth_classifier, inputs(), K, N, LATE, layouts=tuning.standard_layouts(K, N))
    replications = [c for c in tuned.candidates if c.layout == "replication"]
    assert {c.num_groups for c in replications} == {12}
    lost = 1 - np.mean(jax.vmap(ReplicationCode(K, N).recovered)(sample_masks(256, seed=0)))
    np.testing.assert_allclose([c.loss for c in replications], lost, atol=1e-6)


def test_lost_inputs_with_integer_scores_disagree():
    def first_class(x):
        return jnp.round(10 * x).astype(jnp.int32) + jnp.array([1000, 0, 0, 0])

    code = ReplicationCode(K, N)
    tuned = tune_classes(first_class, inputs(), K, N, LATE, layouts={"replication": code})
    lost = 1 - np.mean(jax.vmap(code.recovered)(sample_masks(256, seed=0)))
    np.testing.assert_allclose([c.loss for c in tuned.candidates], lost, atol=1e-6)
    assert lost > 0.05


@jc.pytree("num_data", "num_workers")
class _MeansCode(jc.AbstractCode):
    """Has the first K workers compute an input each and the others the mean of two neighbours; no nodes, no curve."""

    num_data: int
    num_workers: int
    nodes = None
    predicts_error = False

    def encoder_linop(self, plan=None):
        first = np.eye(self.num_data)
        means = (first + np.roll(first, 1, axis=1)) / 2
        return linops.Dense(linops.split(np.concatenate([first, means])[: self.num_workers]))

    def decoder_linop(self, returned, plan=None):
        rows = jnp.where(jnp.asarray(returned)[:, None], self.encoder_linop().matrix(), 0)
        entries = jnp.linalg.pinv(rows)
        return linops.Dense(linops.split(entries), returned)

    def recovered(self, returned, plan=None):
        return jnp.ones(self.num_data, bool)

    def exact(self, returned, plan=None):
        return jnp.zeros(self.num_data, bool)


@pytest.mark.parametrize(
    "code",
    [
        jc.BerrutCode.systematic(K, N),
        jc.FloaterHormannCode.chebyshev(K, N, degree=1),
        jc.BSplineCode.chebyshev(K, N),
        jc.InterpolatingCode(jc.nodes.repeated(K, N), jc.interpolants.Berrut(), jc.interpolants.Spline()),
        _MeansCode(K, N),
    ],
    ids=["Berrut", "Floater-Hormann", "B-spline", "Berrut and spline", "outside code"],
)
def test_any_code_is_a_candidate(code):
    x = jnp.linspace(0, 3, 40)[:, None]
    tuned = tune(jnp.sin, x, K, N, LATE, layouts={"one": code}, orders={"as given": None}, num_masks=32)
    assert jax.tree.structure(tuned.code) == jax.tree.structure(code)
    rmse = root_mean_square(tuned.coded(jnp.sin), jnp.sin, x, sample_masks(32, seed=0))
    assert tuned.candidates[0].rmse == pytest.approx(rmse, rel=1e-3)
    chosen = tune(jnp.sin, x, K, N, LATE, layouts={"one": code, "copies": ReplicationCode(K, N)}, num_masks=32)
    assert {c.layout for c in chosen.candidates} == {"one", "copies"}


@pytest.mark.parametrize("probabilities", [True, False])
def test_a_classifier_is_decoded_from_logits(probabilities):
    def f(x):
        logits = 20 * x @ WEIGHTS
        return jax.nn.softmax(logits) if probabilities else logits

    layouts = {"Chebyshev": SplineCode.chebyshev(K, N)}
    tuned = tune_classes(f, inputs(), K, N, LATE, layouts=layouts, orders={"as given": None})
    assert tuned.output is (outputs.logits if probabilities else outputs.as_returned)
    results = tuned.coded(f)(inputs(seed=1), sample_masks(1)[0])
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
    results = tuned.coded(f)(batch(1), sample_masks(1)[0])
    np.testing.assert_allclose(results["sum"], f(batch(1))["sum"], atol=0.1)


@pytest.mark.long
def test_noisy_answers_are_smoothed():
    noise = jnp.asarray(np.random.default_rng(0).normal(size=997), jnp.float32)

    def f(x):
        # A new number for every input, as noise is, and the same for the same input.
        return jnp.sin(x) + 0.3 * noise[jnp.abs(x * 1e5).astype(jnp.int32) % 997]

    x = jnp.linspace(0, 3, 80)[:, None]
    layouts = {"Chebyshev": SplineCode.chebyshev(K, 40)}
    tuned = tune(f, x, K, 40, LATE, layouts=layouts, orders={"as given": None})
    assert tuned.code.decoder.smoothing > 0
    masks = sample_masks(10, seed=5, num_workers=40)

    def rmse(code):
        predict = jc.coded(f, code)
        return np.mean([float(metrics.rmse(predict(x, mask), jnp.sin(x))) for mask in masks])

    assert rmse(tuned.code) < 0.7 * rmse(layouts["Chebyshev"])


@pytest.mark.long
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

    def smoothings_in_units(tuned):
        return np.array([tuned.code.encoder.smoothing, tuned.code.decoder.smoothing]) * 16**4

    fine_grid = tuned(f)
    monkeypatch.setattr(trials, "_SMOOTHINGS", (0.03, 0.6))
    gradient, grid = tuned(f), tuned(without_derivatives)
    assert smoothings_in_units(grid)[0] == pytest.approx(0.03)
    assert 0.04 < smoothings_in_units(gradient)[0] < 0.3
    error, fine_error, grid_error = (found.candidates[0].rmse for found in (gradient, fine_grid, grid))
    assert error < grid_error
    assert error < 1.001 * fine_error
    masks = sample_masks(256, seed=0, num_stragglers=6, num_workers=16)
    assert error == pytest.approx(root_mean_square(gradient.coded(f), f, x, masks), rel=1e-4)


def test_given_loss_orders_and_layouts():
    def largest_error(estimates, targets):
        return jnp.max(jnp.abs(estimates - targets))

    def backwards(x, num_data):
        return jnp.arange(x.shape[0])[::-1]

    layouts = {"one": SplineCode.systematic(K, N)}
    x = jnp.linspace(0, 3, 40)[:, None]
    tuned = tune(jnp.sin, x, K, N, LATE, loss=largest_error, layouts=layouts, orders={"backwards": backwards})
    assert [(c.layout, c.order) for c in tuned.candidates] == [("one", "backwards")]
    assert tuned.order is backwards
    predict = tuned.coded(jnp.sin)
    masks = sample_masks(256, seed=0)[:64]
    errors = [np.abs(predict(x, mask) - np.sin(x)).reshape(-1, K).max(axis=1).mean() for mask in masks]
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
        assert tuned.coded(f)(inputs(7), sample_masks(1)[0]).shape == (7, 3)


def test_a_model_is_traced_once_for_all_calls():
    traces = []

    def f(x):
        traces.append(x.shape)
        return jnp.sin(x)

    x = jnp.linspace(0, 3, 20)[:, None]
    for num_workers in (6, 8):
        tune(f, x, K, num_workers, LATE, layouts={"copies": ReplicationCode(K, num_workers)}, orders={"own": None})
    assert len(traces) == 1


def test_fewer_workers_than_inputs():
    tuned = tune(jnp.sin, jnp.linspace(0, 3, 20)[:, None], 8, 6, stragglers.Uniform(1), orders={"own": None})
    assert tuned.code.nodes is not None


def test_tokens_and_classes_where_nothing_mixes_them():
    """Copies take inputs and answers of any dtype; a lost input is infinitely far off."""

    def f(tokens):
        return tokens.sum(axis=1) % 7

    tokens = np.random.default_rng(0).integers(0, 100, (40, 3))
    layouts = {"copies": ReplicationCode(K, N)}
    tuned = tune(f, tokens, K, N, LATE, layouts=layouts, orders={"as given": None})
    assert tuned.candidates[0].loss == np.inf
    assert "inputs lost" in tuned.table()
    assert tune(f, tokens, K, N, stragglers.Uniform(0), layouts=layouts).candidates[0].loss == 0


@pytest.mark.parametrize("f", [hash_classifier, smooth_classifier], ids=["rough", "smooth"])
def test_regressors_of_several_numbers_come_back_as_the_model_returns_them(f):
    """No classifier is suspected in them, and no result is NaN."""
    tuned = tune(f, inputs(), K, N, LATE)
    # Where a curve is smoothed, it does not pass through the answers.
    assert np.mean(abs(tuned.coded(f)(inputs(), np.ones(N, bool)) - f(inputs()))) < 0.2
    for mask in sample_masks(20):
        assert np.isfinite(tuned.coded(f)(inputs(), mask)).all()
    assert tuned.output is outputs.as_returned


@pytest.mark.parametrize("degree", [1, 2])
def test_polynomials_are_exact(degree):
    def f(x):
        return (x @ WEIGHTS) ** degree

    num_workers = 4 * 2 + 3
    tuned = tune(f, inputs(), K, num_workers, stragglers.Uniform(2))
    masks = sample_masks(20, num_workers=num_workers)
    assert max(np.max(abs(tuned.coded(f)(inputs(seed=1), mask) - f(inputs(seed=1)))) for mask in masks) < 1e-3


@pytest.fixture(scope="module")
def prior():
    return jc.surrogate(hash_by_cells, inputs(900, seed=5), cost=1e3, progress=False)


def hash_by_cells(x):
    """Gives classes that change in many places, so that curves are of no use and guesses are often wrong."""
    return 2 * jnp.tanh(3 * jnp.sin(3 * x @ WEIGHTS))


@pytest.mark.parametrize(("loss", "batch_size"), [("disagreement", K), ("squared_error", 3 * K), ("disagreement", 60)])
def test_with_a_prior_copies_go_where_it_is_unsure(prior, batch_size, loss):
    x = inputs(240, seed=6)
    layouts = tuning.standard_layouts(K, N)
    tuned = tune(hash_by_cells, x, K, N, LATE, layouts=layouts, prior=prior, batch_size=batch_size, loss=loss)
    best = tuned.candidates[0]
    assert (best.layout, best.order, best.prior) == ("replication", "by risk", "prior, copies by risk")
    assert best.work == pytest.approx(N + prior.cost * K)
    predict, masks = tuned.coded(hash_by_cells), sample_masks(256, seed=0)

    def mean_loss_in_batches(predict):
        groups = [x[start : start + batch_size] for start in range(0, len(x), batch_size)]
        run = jax.jit(jax.vmap(predict, (None, 0)))
        results = [(run(group, masks), hash_by_cells(group)) for group in groups]
        if loss == "disagreement":
            return np.mean([1 - metrics.agreement(r, jnp.broadcast_to(t, r.shape)) for r, t in results])
        return np.mean([np.mean(np.sum((r - t) ** 2, axis=-1)) for r, t in results])

    np.testing.assert_allclose(best.loss, mean_loss_in_batches(predict), rtol=1e-4)
    unplaced = jc.coded(hash_by_cells, ReplicationCode(K, N), prior=prior)
    assert best.loss < 0.95 * mean_loss_in_batches(unplaced)
    if loss == "disagreement":
        replication = min(c.loss for c in tuned.candidates if c.layout == "replication" and not c.prior)
        assert best.loss < 0.7 * replication


def test_what_a_prior_explains_is_not_decoded():
    """Of a sum of a smooth and a rough function, the rough one is the prior's."""

    def f(x):
        return hash_classifier(x) + jnp.sin(x[:, :1])

    def guess(x):
        return hash_classifier(x) + 0 * x[:, :1]

    x = inputs(120)
    exact = jc.surrogate(f, x, features=guess, progress=False)
    layouts = {"spline": SplineCode.systematic(K, N)}
    tuned = tune(f, x, K, N, LATE, prior=exact, layouts=layouts, batch_size=120)
    best = tuned.candidates[0]
    assert best.prior == "prior"
    assert best.work == pytest.approx(N + exact.cost * (N + K))
    np.testing.assert_allclose(best.rmse, root_mean_square(tuned.coded(f), f, x, sample_masks(256, seed=0)), rtol=0.01)
    assert best.rmse < 0.7 * min(c.rmse for c in tuned.candidates if not c.prior)


def test_a_prior_that_knows_nothing_is_not_used():
    x = jnp.linspace(0, 3, 60)[:, None]
    useless = jc.surrogate(jnp.sin, x, features=lambda x: 0 * x, progress=False)
    layouts = tuning.standard_layouts(K, N)
    tuned = tune(jnp.sin, x, K, N, LATE, layouts=layouts, prior=useless, batch_size=60)
    assert tuned.candidates[0].loss < 1e-3
    assert tuned.coded(jnp.sin).prior_planner is None or tuned.candidates[0].layout != "replication"


def test_tuning_stops_in_time():
    tuned = tune_classes(smooth_classifier, inputs(), K, N, LATE, time_limit=0.0)
    assert {c.layout for c in tuned.candidates} == {"replication"}
    assert tuned.candidates[0].num_groups == 12


@pytest.mark.parametrize(
    ("make", "x64"),
    [(SplineCode.systematic, True), (_MeansCode, False), (_MeansCode, True)],
    ids=["spline", "outside code", "outside code, x64"],
)
def test_strict_promotion_of_dtypes_and_ranks(make, x64):
    x = np.linspace(0, 3, 40, dtype=np.float32)[:, None]
    images = np.random.default_rng(0).integers(0, 256, (40, 4), np.uint8)
    layouts = {"one": make(K, N), "copies": ReplicationCode(K, N)}

    def classifier(x):
        return jnp.tanh(x.astype(jnp.float32) @ WEIGHTS / 100)

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"), jax.enable_x64(x64):
        tuned = tune(jnp.sin, x, K, N, LATE, layouts=layouts, num_masks=32)
        assert tuned.coded(jnp.sin)(x, sample_masks(1)[0]).dtype == jnp.float32
        tuned = tune(classifier, images, K, N, LATE, layouts=layouts, orders={"as given": None}, num_masks=32)
    assert tuned.candidates[0].loss < 0.2


def test_the_report(tmp_path, capsys):
    tuned = tuning.tune(smooth_classifier, inputs(), K, N, LATE, loss="disagreement", batch_size=60)
    assert "candidate" in capsys.readouterr().err
    lines = tuned.table().splitlines()
    assert len(lines) == len(tuned.candidates) + 1
    kernels = [candidate for candidate in tuned.candidates if isinstance(candidate.code, jc.KernelCode)]
    # And replication whose lost inputs are predicted by a process fitted to the sample.
    assert len(kernels) == len(tuning.kernel_layouts(K, N)) + 1
    assert len(tuned.candidates) == 3 * len(tuning.standard_layouts(K, N)) + len(kernels)
    assert lines[1].startswith(tuned.candidates[0].layout)
    assert f"{tuned.candidates[0].loss:.4g}" in lines[1]
    assert str(tuned.num_evaluations) in str(tuned).replace(",", "")
    tuned.plot(tmp_path / "tuned.png")
    assert (tmp_path / "tuned.png").stat().st_size > 1000


WRONG = {
    "loss": ({"loss": "accuracy"}, "loss is 'accuracy'; expected one of squared_error, disagreement"),
    "no classes": ({"f": lambda x: x[:, :1], "loss": "disagreement"}, "loss is 'disagreement', but f returned"),
    "batch": ({"batch_size": 4}, "batch_size is 4"),
    "one batch": ({"x_sample": inputs(13), "batch_size": 9}, "two groups of num_data, 5, in whole batches"),
    "nobody": ({"stragglers": stragglers.Uniform(N - 1)}, "fewer than two answers of 8 in all but 0 of 256 sets"),
    "prior": ({"prior": smooth_classifier}, "prior is <function"),
    "short": ({"x_sample": inputs(9)}, "x_sample has 9 inputs.*at least two groups.*10"),
    "K": ({"num_data": 1}, "num_data is 1"),
    "stragglers": ({"stragglers": 2}, "stragglers is 2; expected a model such as"),
    "sizes": ({"layouts": {"a": SplineCode.repeated(4, 8)}}, "layouts\\['a'\\].*4 inputs for 8 workers.*5 and 8"),
    "kind": ({"layouts": {"a": "Berrut"}}, "layouts\\['a'\\] is 'Berrut'; expected a code such as SplineCode"),
    "none": ({"orders": {}}, "orders 0 entries"),
    "tokens": ({"x_sample": np.arange(60).reshape(20, 3), "orders": {"own": None}}, "x has dtype.*code the embeddings"),
    "classes": ({"f": lambda x: jnp.argmax(x, axis=1), "orders": {"own": None}}, "return logits, not classes"),
    "scalar": ({"f": lambda x: jnp.mean(x), "orders": {"own": None}}, "batch of 60; expected the batch as its leading"),
    "order": ({"orders": {"own": lambda x, num_data: jnp.arange(3)}}, "order returned int32 of shape \\(3,\\)"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_bad_arguments(unchecked, arguments, message):
    defaults = {
        "f": lambda x: x[:, :3] + 0.5,
        "x_sample": inputs(),
        "num_data": K,
        "num_workers": N,
        "stragglers": LATE,
    }
    with pytest.raises(ValueError, match=message):
        tune(**(defaults | arguments))
