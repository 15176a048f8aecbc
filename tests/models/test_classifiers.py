import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcode as jc
from models import datasets, networks
from models.comparison import METRICS, Comparison, Scheme, compare, sample_masks
from models.experiments.classifiers import (
    SMOOTHINGS,
    CodedAnswers,
    FixedSignBerrut,
    Setting,
    against_stragglers,
    best_smoothings,
    differences,
    gains,
    sensitivity,
)


@pytest.fixture(scope="module")
def network():
    data = datasets.load("digits")
    return networks.digits(), data


def test_the_signs_of_all_workers_have_poles_where_some_are_missing():
    nodes = jc.nodes.chebyshev(6, 12)
    returned = np.arange(12) != 5
    codes = [
        jc.InterpolatingCode(nodes, jc.interpolants.Berrut(), decoder)
        for decoder in (jc.interpolants.Berrut(), FixedSignBerrut())
    ]
    fair, fixed = (code.decoder_matrix(np.ones(12, bool)) for code in codes)
    np.testing.assert_allclose(fixed, fair, atol=1e-6)
    fair, fixed = (np.asarray(code.decoder_matrix(returned)) for code in codes)
    np.testing.assert_allclose(fixed.sum(axis=1), 1, atol=1e-5)
    assert np.abs(fixed).max() > 1.5 * np.abs(fair).max()


def test_the_mean_norm_is_that_of_the_code(network):
    model, data = network
    x = data.x_train[:16]
    norms = CodedAnswers(model, x, 12, 8).mean_norms([(0.0, 0.0), (1e-4, 1e-3)], 3, num_sets=2, seed=5)
    masks = sample_masks(jax.random.key(5), jnp.array([3]), num_sets=2, requests=2, num_workers=12)

    def probabilities(x):
        return jax.nn.softmax(model(x))

    for row, (encoder, decoder) in zip(norms, ((0.0, 0.0), (1e-4, 1e-3)), strict=True):
        code = jc.SplineCode.chebyshev(8, 12, encoder_smoothing=encoder, decoder_smoothing=decoder)
        predict = jc.coded(probabilities, code)
        for norm, mask in zip(row, masks, strict=True):
            decoded = np.concatenate([predict(x[:8], mask[0]), predict(x[8:], mask[1])])
            np.testing.assert_allclose(norm, jc.metrics.mean_error_norm(decoded, probabilities(x)), rtol=1e-4)


def test_the_search_finds_no_worse_than_none(network):
    model, data = network
    answers = CodedAnswers(model, data.x_train[:16], 12, 8)
    best = answers.search(3, num_sets=2)
    assert set(best) <= set(SMOOTHINGS)
    norms = answers.mean_norms([best, (0.0, 0.0), (0.0, 1.0)], 3, num_sets=2).mean(axis=1)
    assert norms[0] == norms.min()
    assert norms[2] > 1.3 * norms[0]


def test_one_pair_for_all_costs_nothing_where_it_is_the_best(network):
    model, data = network
    found = best_smoothings(model, data, Setting(12, 8, (1, 3)), num_images=16, num_sets=2)
    assert found.pairs.shape == found.costs.shape == (2, 2)
    is_common = np.all(found.pairs == found.common, axis=1)
    assert is_common.any()
    np.testing.assert_array_equal(found.costs[is_common], 0)


def test_sensitivity_is_relative_to_the_best_positive_smoothing(network):
    model, data = network
    measured = sensitivity(model, data, 12, 8, 3, num_seeds=2, batch_size=16)
    assert measured.increases.shape == (2, len(SMOOTHINGS), 2)
    for position in (0, 1):
        index = np.flatnonzero(measured.positive[position] == SMOOTHINGS)[0]
        assert index > 0
        np.testing.assert_array_equal(measured.increases[position, index], 0)
        assert measured.best[position] in (0, measured.positive[position])
    # A line through all data is worse than any curve.
    assert np.all(measured.increases[:, -1] > 0.1)


@pytest.mark.long
def test_schemes_are_measured_on_test_images_only(network):
    model, data = network
    changed = dataclasses.replace(data, x_test=data.x_test[:80], y_test=data.y_test[:80])
    setting = Setting(12, 8, (1, 4))
    measured = against_stragglers(model, changed, setting, num_seeds=2, batch_size=16)
    assert [scheme.name for scheme in measured.schemes][:3] == ["letcc", "bacc", "bacc_fixed"]
    letcc = measured.schemes[0].code
    answers = CodedAnswers(model, data.x_train[:16], 12, 8)
    assert (letcc.encoder.smoothing, letcc.decoder.smoothing) == answers.search_all((1, 4))[1]
    bacc = Scheme("bacc", "BACC", jc.BerrutCode.chebyshev(8, 12), "softmax")
    alone = compare(
        model, changed.x_test, changed.y_test, (bacc,), (1, 4), num_data=8, num_workers=12, batch_size=16, num_seeds=2
    )
    for metric in METRICS:
        np.testing.assert_allclose(measured.values[metric][1], alone.values[metric][0], rtol=1e-5)


def test_differences_are_paired():
    schemes = tuple(Scheme(name, name, jc.UncodedCode(2), "softmax") for name in ("letcc", "bacc"))
    bacc = np.array([[1.0, 2, 4]] * 3)
    # Lower by .5 for the first S, higher for the second, the same for the third, though values vary much more.
    values = np.stack([bacc + np.array([[-0.5], [0.5], [0.0]]), bacc]).astype(np.float32)
    comparison = Comparison(schemes, (1, 2, 3), {"rmse": values}, np.ones(3, np.float32))
    assert differences(comparison, "rmse", "letcc", "bacc") == (1, 1)
    halved = np.stack([bacc / 2, bacc]).astype(np.float32)
    comparison = Comparison(schemes, (1, 2, 3), {"rmse": halved}, np.ones(3, np.float32))
    assert gains(comparison, "rmse") == pytest.approx((-50, 0))
    assert gains(comparison, "rmse", "bacc", "letcc") == pytest.approx((100, 0))
