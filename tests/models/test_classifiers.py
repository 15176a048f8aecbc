import numpy as np
import pytest

import jaxcode as jc
from models import datasets, networks
from models.experiments.classifiers import (
    SMOOTHINGS,
    CodedAnswers,
    FixedSignBerrut,
    Setting,
    sensitivity,
    smoothings_against_stragglers,
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
    x = data.x_train[:8]
    norms = CodedAnswers(model, x, 12, 8).mean_norms([(0.0, 0.0), (0.0, 1e-3)], 0, num_sets=2)
    for row, smoothing in zip(norms, (0.0, 1e-3), strict=True):
        code = jc.SplineCode.chebyshev(8, 12, decoder_smoothing=smoothing)
        decoded = jc.coded(lambda x: jc.outputs.probabilities.transform(model(x)), code)(x, np.ones(12, bool))
        truth = jc.outputs.probabilities.transform(model(x))
        np.testing.assert_allclose(row, jc.metrics.mean_error_norm(decoded, truth), rtol=1e-4)


def test_the_search_finds_no_worse_than_none(network):
    model, data = network
    answers = CodedAnswers(model, data.x_train[:16], 12, 8)
    best = answers.search(3, num_sets=2)
    assert set(best) <= set(SMOOTHINGS)
    norms = answers.mean_norms([best, (0.0, 0.0), (0.0, 1.0)], 3, num_sets=2).mean(axis=1)
    assert norms[0] == norms.min()
    assert norms[2] > 1.3 * norms[0]


def test_every_number_of_stragglers_has_its_best_smoothings(network):
    model, data = network
    images = data.x_train[:16]
    found = smoothings_against_stragglers(model, images, Setting(12, 8, (1, 3)))
    answers = CodedAnswers(model, images, 12, 8)
    np.testing.assert_array_equal(found, [answers.search(count) for count in (1, 3)])


def test_sensitivity_is_relative_to_the_best(network):
    model, data = network
    measured = sensitivity(model, data, 12, 8, 3, num_seeds=2, batch_size=16)
    assert measured.increases.shape == (2, len(SMOOTHINGS), 2)
    for position in (0, 1):
        index = np.flatnonzero(measured.best[position] == SMOOTHINGS)[0]
        np.testing.assert_array_equal(measured.increases[position, index], 0)
    # A line through all data is worse than any curve.
    assert np.all(measured.increases[:, -1] > 0.1)
