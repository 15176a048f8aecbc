import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats
from sklearn.kernel_ridge import KernelRidge
from sklearn.neighbors import KNeighborsRegressor

from models import networks
from models.comparison import (
    METRICS,
    compare,
    fill_by_ridge,
    fill_from_nearest,
    mean_and_half_width,
    standard_schemes,
    write_csv,
)
from models.datasets import load

COUNTS = (0, 3, 6)
NUM_DATA, NUM_WORKERS, NUM_SEEDS = 4, 10, 3


class _Linear(nnx.Module):
    """A classifier without training, which is enough for what codes do with its answers."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(784, 10, rngs=rngs)

    def __call__(self, x):
        return 4 * self.dense(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def data():
    return load("digits")


def _run(data, schemes, seed=0, num_seeds=NUM_SEEDS):
    return compare(
        _Linear(nnx.Rngs(0)),
        data.x_test,
        data.y_test,
        schemes,
        COUNTS,
        num_data=NUM_DATA,
        num_workers=NUM_WORKERS,
        batch_size=42,
        num_seeds=num_seeds,
        seed=seed,
        progress=False,
    )


@pytest.fixture(scope="module")
def comparison(data):
    return _run(data, standard_schemes(NUM_DATA, NUM_WORKERS))


def _index(comparison, name):
    return [scheme.name for scheme in comparison.schemes].index(name)


def test_every_figure_is_finite_and_in_range(comparison):
    for metric in METRICS:
        values = comparison.values[metric]
        assert values.shape == (len(comparison.schemes), len(COUNTS), NUM_SEEDS)
        assert np.isfinite(values).all()
        assert (values >= 0).all()
        if metric in ("accuracy", "agreement", "lost"):
            assert (values <= 1).all()


@pytest.mark.parametrize("name", ["uncoded", "replication"])
def test_copies_are_right_unless_lost(comparison, name):
    index = _index(comparison, name)
    lost = comparison.values["lost"][index]
    np.testing.assert_allclose(comparison.values["agreement"][index], 1 - lost, atol=1e-6)
    np.testing.assert_allclose(lost[0], 0, atol=1e-6)
    np.testing.assert_allclose(comparison.values["rmse"][index, 0], 0, atol=1e-5)
    # Smaller straggler sets are parts of the larger ones.
    assert (np.diff(lost, axis=0) >= 0).all()
    assert lost[-1].mean() > 0.02


def test_uncoded_loses_the_share_of_stragglers(data):
    uncoded = standard_schemes(NUM_DATA, NUM_WORKERS)[:1]
    lost = _run(data, uncoded, num_seeds=24).values["lost"][0]
    # 24 batches of 10 requests of 4 workers: a standard error of 0.014 or less.
    np.testing.assert_allclose(lost.mean(axis=-1), np.array(COUNTS) / NUM_WORKERS, atol=0.06)


def test_a_lost_input_counts_as_equal_probabilities(data):
    uncoded = standard_schemes(NUM_DATA, NUM_WORKERS)[:1]
    comparison = _run(data, uncoded)
    model = _Linear(nnx.Rngs(0))
    probabilities = np.asarray(jax.nn.softmax(model(jnp.asarray(data.x_test))))
    error = np.sum((probabilities - 0.1) ** 2, axis=-1)
    lost, rmse = comparison.values["lost"][0, -1], comparison.values["rmse"][0, -1]
    # The lost images are a random sample of all.
    np.testing.assert_allclose(np.mean(rmse**2 / lost), error.mean(), rtol=0.15)


def test_splines_lose_nothing_and_get_worse_with_stragglers(comparison):
    for name in ("bacc", "letcc", "logits", "ordered", "repeated"):
        index = _index(comparison, name)
        assert not comparison.values["lost"][index].any()
        rmse = comparison.values["rmse"][index].mean(axis=-1)
        assert rmse[0] < rmse[-1]
    # With repeated nodes the workers hold the inputs themselves.
    assert comparison.values["rmse"][_index(comparison, "repeated"), 0].max() < 1e-3
    np.testing.assert_allclose(comparison.values["agreement"][_index(comparison, "repeated"), 0], 1)


def test_the_seed_decides_everything(data):
    schemes = standard_schemes(NUM_DATA, NUM_WORKERS)[1:3]
    first, repeated, other = _run(data, schemes, 1), _run(data, schemes, 1), _run(data, schemes, 2)
    for metric in METRICS:
        np.testing.assert_array_equal(first.values[metric], repeated.values[metric])
    assert not np.array_equal(first.values["rmse"], other.values["rmse"])


def test_intervals_are_those_of_students_t():
    values = np.random.default_rng(0).normal(size=(3, 2, 7))
    mean, half = mean_and_half_width(values)
    interval = stats.ttest_1samp(values, 0, axis=-1).confidence_interval(0.95)
    np.testing.assert_allclose(mean - half, interval.low)
    np.testing.assert_allclose(mean + half, interval.high)
    with pytest.raises(ValueError, match="at least 2 seeds"):
        mean_and_half_width(values[..., :1])


def test_the_file_holds_every_figure(comparison, tmp_path):
    write_csv(comparison, tmp_path / "figures.csv")
    with (tmp_path / "figures.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(METRICS) * len(comparison.schemes) * len(COUNTS)
    row = next(r for r in rows if (r["scheme"], r["num_stragglers"], r["metric"]) == ("bacc", "3", "rmse"))
    values = comparison.values["rmse"][_index(comparison, "bacc"), 1]
    assert float(row["mean"]) == pytest.approx(values.mean(), abs=1e-5)
    assert float(row["low"]) < float(row["mean"]) < float(row["high"])


def test_texts_are_compared_by_codes_after_the_embedding():
    data = load("unicode")
    model = networks.make("text_encoder", data, seed=0)
    schemes = [standard_schemes(NUM_DATA, NUM_WORKERS)[i] for i in (1, 6)]
    sizes = {"num_data": NUM_DATA, "num_workers": NUM_WORKERS, "batch_size": 42, "num_seeds": 2}
    values = compare(model, data.x_test, data.y_test, schemes, COUNTS, **sizes, progress=False).values
    np.testing.assert_allclose(values["agreement"][0], 1 - values["lost"][0], atol=1e-6)
    np.testing.assert_allclose(values["agreement"][1, 0], 1)
    assert not values["lost"][1].any()


def _batch():
    rng = np.random.default_rng(0)
    inputs, results = rng.normal(size=(40, 3, 2)).astype(np.float32), rng.normal(size=(40, 4)).astype(np.float32)
    is_lost = rng.random(40) < 0.3
    return np.where(is_lost[:, None], np.nan, results).astype(np.float32), is_lost, inputs


@pytest.mark.parametrize("group_size", [None, 8])
def test_filling_from_the_nearest_is_scikit_learns(group_size):
    results, is_lost, inputs = _batch()
    filled = fill_from_nearest(*map(jnp.asarray, (results, is_lost, inputs)), group_size=group_size)
    expected = results.copy()
    for start in range(0, 40, group_size or 40):
        group = slice(start, start + (group_size or 40))
        known = ~is_lost[group]
        flat = inputs[group].reshape(known.size, -1)
        model = KNeighborsRegressor(1).fit(flat[known], results[group][known])
        expected[group][~known] = model.predict(flat[~known])
    np.testing.assert_allclose(filled, expected, rtol=1e-6)


def test_groups_of_which_all_are_lost_stay_so():
    results, is_lost, inputs = _batch()
    is_lost[8:16] = True
    results[8:16] = np.nan
    filled = np.asarray(fill_from_nearest(*map(jnp.asarray, (results, is_lost, inputs)), group_size=8))
    assert np.isnan(filled[8:16]).all()
    assert np.isfinite(np.delete(filled, range(8, 16), axis=0)).all()


def test_filling_by_ridge_is_scikit_learns():
    results, is_lost, inputs = _batch()
    flat = inputs.reshape(40, -1)
    squares = np.sum((flat[:, None] - flat) ** 2, axis=-1)
    model = KernelRidge(alpha=0.01, kernel="rbf", gamma=1 / (2 * 0.5**2 * np.median(squares)))
    mean = results[~is_lost].mean(axis=0)
    model.fit(flat[~is_lost], results[~is_lost] - mean)
    expected = np.where(is_lost[:, None], mean + model.predict(flat), results)
    filled = fill_by_ridge(*map(jnp.asarray, (results, is_lost, inputs)))
    np.testing.assert_allclose(filled, expected, rtol=1e-3, atol=1e-3)
