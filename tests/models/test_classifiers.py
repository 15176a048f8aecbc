import numpy as np
import pytest

import jaxcode as jc
from models import datasets, networks
from models.experiments.classifiers import SMOOTHINGS, FixedSignBerrut, Setting, mean_norms, search_smoothing


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
    norms = mean_norms(model, x, Setting(12, 8, (3,)), 0, [(0.0, 0.0), (0.0, 1e-3)], num_sets=2)
    for row, smoothing in zip(norms, (0.0, 1e-3), strict=True):
        code = jc.SplineCode.chebyshev(8, 12, decoder_smoothing=smoothing)
        decoded = jc.coded(lambda x: jc.outputs.probabilities.transform(model(x)), code)(x, np.ones(12, bool))
        truth = jc.outputs.probabilities.transform(model(x))
        np.testing.assert_allclose(row, jc.metrics.mean_error_norm(decoded, truth), rtol=1e-4)


def test_the_search_finds_no_worse_than_none(network):
    model, data = network
    setting = Setting(30, 10, (5,))
    best = search_smoothing(model, data.x_train[:100], setting, 5, num_sets=2)
    assert set(best) <= set(SMOOTHINGS)
    norms = mean_norms(model, data.x_train[:100], setting, 5, [best, (0.0, 0.0), (0.0, 1.0)], num_sets=2).mean(axis=1)
    assert norms[0] == norms.min()
    assert norms[2] > 2 * norms[0]
