import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcode as jc
from models import datasets, networks
from models.comparison import compare, filled_schemes, surrogate_schemes
from models.surrogate import distil


@pytest.fixture(scope="module")
def distilled():
    model, data = networks.digits(), datasets.load("digits")
    return model, data, distil(model, data.x_train[:600], cost=1.0)


def test_the_surrogate_predicts_the_classes_of_the_network(distilled):
    model, data, surrogate = distilled
    assert jc.metrics.agreement(surrogate(data.x_test), model(data.x_test)) > 0.85
    cheap = distil(model, data.x_train[:100], cost=0.1)
    assert 0 < cheap.cost <= 0.1
    assert cheap.kernel.shape[-1] < surrogate.kernel.shape[-1] / 8


def test_groups_begin_with_the_least_certain(distilled):
    _, data, surrogate = distilled
    order = surrogate.order(data.x_test[:30], 8)
    assert sorted(order[8:16]) == list(range(8, 16))
    assert sorted(order) == list(range(30))
    top = np.sort(np.asarray(surrogate(data.x_test[:30])), axis=1)[order]
    margin = top[:, -1] - top[:, -2]
    assert np.all(np.diff(margin[:8]) >= 0)
    assert np.all(np.diff(margin[24:]) >= 0)


def test_lost_inputs_have_predicted_logits(distilled):
    _, data, surrogate = distilled
    images = jnp.asarray(data.x_test[:4])
    is_lost = jnp.array([True, False, False, True])
    filled = jax.jit(surrogate.fill)(jnp.where(is_lost[:, None], jnp.nan, jnp.ones((4, 10))), is_lost, images)
    np.testing.assert_allclose(filled, np.where(is_lost[:, None], surrogate(images), 1), rtol=1e-4, atol=1e-4)


def test_copies_go_to_the_least_certain(distilled):
    model, data, _ = distilled
    surrogate = distil(model, data.x_train[:100], cost=0.1)
    size = {"num_data": 8, "num_workers": 12}
    schemes = (*surrogate_schemes(surrogate, **size), *filled_schemes(**size))
    comparison = compare(
        model,
        data.x_test,
        data.y_test,
        schemes,
        (0, 6),
        **size,
        batch_size=200,
        num_seeds=4,
        num_sets=10,
        progress=False,
    )
    agreement = comparison.values["agreement"].mean(axis=-1)
    np.testing.assert_array_equal(agreement[:, 0], 1)
    assert agreement[1, 1] > agreement[0, 1]
    # What is lost depends on the code and the masks alone; the order of inputs changes nothing.
    lost = comparison.values["lost"]
    assert np.all(lost[:, 1] > 0)
    np.testing.assert_allclose(lost[0], lost[2], rtol=1e-6)
