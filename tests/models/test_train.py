import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.datasets import Dataset, load
from models.lenet5 import LeNet5
from models.train import _augment, accuracy, fit


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def _part(data, num):
    return Dataset(data.x_train[:num], data.y_train[:num], data.x_test, data.y_test, data.class_names)


def test_training_learns_the_digits(digits):
    model = LeNet5(rngs=nnx.Rngs(0))
    before = accuracy(model, digits.x_test, digits.y_test)
    losses = fit(model, digits, epochs=8, progress=False)
    assert losses.shape == (8,)
    assert losses[0] > 1.0
    assert losses[-1] < 0.1
    assert before < 0.4
    assert accuracy(model, digits.x_test, digits.y_test) >= 0.95


def test_the_seed_decides_the_order_of_the_images(digits):
    def losses(seed):
        return fit(LeNet5(rngs=nnx.Rngs(0)), _part(digits, 192), seed=seed, epochs=2, progress=False)

    np.testing.assert_array_equal(losses(3), losses(3))
    assert not np.array_equal(losses(3), losses(4))


class _Normalised(nnx.Module):
    """A classifier with running averages and dropout, whose state training must carry along."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(784, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.dense = nnx.Linear(784, 10, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.dropout(self.norm(x.reshape(x.shape[0], -1))))


def test_running_averages_follow_and_the_model_ends_in_evaluation_mode(digits):
    model = _Normalised(nnx.Rngs(0))
    fit(model, digits, epochs=3, progress=False)
    pixels = digits.x_train.reshape(len(digits.x_train), -1)
    assert model.norm.use_running_average
    assert model.dropout.deterministic
    # 63 steps with momentum 0.99: the average has gone 47 % of its way from 0.
    ratio = np.asarray(model.norm.mean.get_value()).sum() / pixels.mean(axis=0).sum()
    assert ratio == pytest.approx(1 - 0.99**63, rel=0.05)


def test_accuracy_counts_every_image_once(digits):
    model = LeNet5(rngs=nnx.Rngs(0))
    x, y = digits.x_test[:7], digits.y_test[:7]
    expected = float(np.mean(np.argmax(np.asarray(model(jnp.asarray(x))), axis=-1) == y))
    assert accuracy(model, x, y) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"epochs": 0}, "epochs"), ({"batch_size": 0}, "batch_size"), ({"batch_size": 2000}, "1397")],
)
def test_bad_arguments(digits, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(LeNet5(rngs=nnx.Rngs(0)), digits, progress=False, **arguments)


def test_augmented_images_are_shifted_and_mirrored_ones():
    x = np.random.default_rng(0).random((200, 16, 16, 1)).astype(np.float32)
    augmented = _augment(x, np.random.default_rng(1))
    padded = np.pad(x, [(0, 0), (2, 2), (2, 2), (0, 0)])
    transformations = set()
    for i, image in enumerate(augmented):
        matches = [
            (row, column, mirrored)
            for row in range(5)
            for column in range(5)
            for mirrored in (False, True)
            if np.array_equal(image, padded[i, row : row + 16, column : column + 16][:, :: -1 if mirrored else 1])
        ]
        assert len(matches) == 1
        transformations.add(matches[0])
    assert len(transformations) > 40
