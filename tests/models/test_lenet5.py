import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.lenet5 import LeNet5, LeNet5Linen, to_linen
from models.serialization import num_parameters

SHAPES = {(28, 28, 1): 61_706, (32, 32, 3): 62_006}


@pytest.mark.parametrize("shape", SHAPES)
def test_number_of_parameters(shape):
    assert num_parameters(LeNet5(shape, rngs=nnx.Rngs(0))) == SHAPES[shape]
    variables = jax.eval_shape(LeNet5Linen().init, jax.random.key(0), jnp.zeros((1, *shape)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == SHAPES[shape]


@pytest.mark.parametrize("shape", SHAPES)
def test_linen_and_nnx_agree_with_the_same_weights(shape):
    model = LeNet5(shape, num_classes=7, rngs=nnx.Rngs(1))
    x = jax.random.uniform(jax.random.key(2), (5, *shape))
    expected = model(x)
    assert expected.shape == (5, 7)
    np.testing.assert_allclose(LeNet5Linen(7).apply(to_linen(model), x), expected, rtol=1e-5, atol=1e-6)


def test_the_linen_module_depends_on_the_weights():
    x = jax.random.uniform(jax.random.key(2), (2, 28, 28, 1))
    first, second = (LeNet5Linen().apply(to_linen(LeNet5(rngs=nnx.Rngs(seed))), x) for seed in (0, 1))
    assert not np.allclose(first, second, atol=1e-3)


def test_classes_are_not_shared_between_images_of_a_batch():
    model = LeNet5(rngs=nnx.Rngs(0))
    x = jax.random.uniform(jax.random.key(2), (3, 28, 28, 1))
    np.testing.assert_allclose(model(x)[1:2], model(x[1:2]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 32, 1)])
def test_other_image_sizes_are_refused(shape):
    with pytest.raises(ValueError, match=f"{shape[0]} x {shape[1]}"):
        LeNet5(shape, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"{shape[0]} x {shape[1]}"):
        LeNet5Linen().init(jax.random.key(0), jnp.zeros((1, *shape)))
