import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcode import SplineCode, coded
from models import serialization as weights
from models.lenet5 import LeNet5, num_parameters
from models.resnet import ResNet14


def images(size=3, side=32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).random((size, side, side, 3)), jnp.float32)


@pytest.fixture(scope="module")
def trained():
    """A network whose running averages have moved."""
    model = ResNet14(rngs=nnx.Rngs(0))
    model.train()
    nnx.jit(lambda model, x: model(x))(model, images(8))
    model.eval()
    return model


def test_the_number_of_parameters_is_that_of_the_docstring(trained):
    assert trained(images()).shape == (3, 10)
    assert f"{num_parameters(trained):,}" in ResNet14.__doc__
    with pytest.raises(ValueError, match="at least 8 x 8, got 7 x 32"):
        ResNet14((7, 32, 3), rngs=nnx.Rngs(0))


def test_images_of_a_batch_are_independent_in_evaluation(trained):
    x = images(4)
    np.testing.assert_allclose(trained(x)[:1], trained(x[:1]), atol=1e-5)


def test_a_coded_network_gives_its_answers(trained):
    predict = coded(trained, SplineCode.repeated(3, 6))
    np.testing.assert_allclose(predict(images(), np.arange(6) > 0), trained(images()), atol=1e-4)


def test_saved_weights_are_loaded_bit_for_bit(trained, tmp_path):
    path = tmp_path / "new" / "weights.safetensors"
    weights.save(trained, path)
    other = ResNet14(rngs=nnx.Rngs(1))
    weights.load(other, path)
    np.testing.assert_array_equal(jax.jit(lambda x: other(x))(images()), jax.jit(lambda x: trained(x))(images()))
    with pytest.raises(ValueError, match=r"does not fit LeNet5: blocks\.0\.first\.conv\.kernel"):
        weights.load(LeNet5(rngs=nnx.Rngs(0)), path)
