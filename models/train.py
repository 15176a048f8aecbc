"""Trains classifiers written as `flax.nnx` modules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Float32, Int
from tqdm import tqdm

from .datasets import Dataset


def fit(
    model: nnx.Module,
    dataset: Dataset,
    *,
    seed: int = 0,
    epochs: int = 15,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    augment: bool = False,
    progress: bool = True,
) -> Float32[np.ndarray, "epochs"]:
    """Trains a classifier in place: Adam on the cross-entropy, one warm-up epoch, then a cosine schedule to zero.

    Each epoch takes the training images in a new order and leaves out the last incomplete batch. State other than
    parameters (running averages, dropout's keys) is updated too. Afterwards the model is in evaluation mode.

    Steps are called from Python, one by one, because XLA's CPU convolutions are about three times slower
    inside `lax.scan` (LeNet5 on two cores: 0.57 s an epoch of digits against 0.19 s).

    Args:
        model: Nnx module from images (batch, height, width, channels) to logits (batch, classes); changed in
            place.
        dataset: The training images and labels.
        seed: Seed of the order of the images (the initial weights are the model's own).
        epochs: Passes over the training images, at least 1.
        batch_size: Images in a step, at most the number of training images.
        learning_rate: The highest step size of Adam.
        augment: Whether every second image is mirrored and all are shifted by up to an eighth of their size, at
            random; for natural images, not for digits.
        progress: Whether to show a progress bar on standard error.

    Returns:
        Mean cross-entropy in nats of each epoch, (epochs,) float32.

    Raises:
        ValueError: If `epochs` or `batch_size` is out of range.
    """
    num_images = len(dataset.x_train)
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if not 1 <= batch_size <= num_images:
        raise ValueError(f"batch_size must be from 1 to the {num_images} training images, got {batch_size}")
    steps = num_images // batch_size
    warmup = min(steps, epochs * steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(learning_rate / 10, learning_rate, warmup, epochs * steps)
    optimizer = optax.adam(schedule)

    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, rest, opt_state, x: Float[Array, "batch ..."], y: Int[Array, "batch"]):
        def loss(params):
            # Rebuilt, because Flax lets a variable change only under the transformation that made it.
            module = nnx.merge(graph, params, jax.tree.map(lambda leaf: leaf, rest))
            value = optax.softmax_cross_entropy_with_integer_labels(module(x), y).mean()
            return value, nnx.split(module, nnx.Param, ...)[2]

        (value, new_rest), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), new_rest, opt_state, value

    rng = np.random.default_rng(seed)
    history = np.zeros(epochs, np.float32)
    with tqdm(total=epochs * steps, desc="training", unit="step", disable=not progress, leave=True) as bar:
        for epoch in range(epochs):
            total = jnp.zeros(())
            for batch in rng.permutation(num_images)[: steps * batch_size].reshape(steps, batch_size):
                x, y = dataset.x_train[batch], dataset.y_train[batch]
                if augment:
                    x = _augment(x, rng)
                params, rest, opt_state, value = step(params, rest, opt_state, x, y)
                total = total + value
                bar.update()
            history[epoch] = float(total) / steps
            bar.set_postfix(epoch=f"{epoch + 1}/{epochs}", loss=f"{history[epoch]:.4f}")
    nnx.update(model, params, rest)
    model.eval()
    return history


def _augment(
    x: Float32[np.ndarray, "batch height width channels"], rng: np.random.Generator
) -> Float32[np.ndarray, "batch height width channels"]:
    """Mirrors images with probability one half and shifts them within a black margin of an eighth of their size."""
    batch, height, width, _ = x.shape
    margins = height // 8, width // 8
    rows, columns = (rng.integers(0, 2 * margin + 1, (batch, 1)) for margin in margins)
    padded = np.pad(x, [(0, 0), *((margin, margin) for margin in margins), (0, 0)])
    columns = columns + np.where(rng.random((batch, 1)) < 0.5, np.arange(width), np.arange(width)[::-1])
    rows = rows + np.arange(height)
    return padded[np.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]


def predicted_classes(
    model: nnx.Module, x: Float32[np.ndarray, "images height width channels"], *, batch_size: int = 500
) -> Int[np.ndarray, "images"]:
    """Computes the class with the highest logit, for every image."""
    graph, state = nnx.split(model)
    predict = jax.jit(lambda state, x: jnp.argmax(nnx.merge(graph, state)(x), axis=-1))
    parts = [predict(state, x[start : start + batch_size]) for start in range(0, len(x), batch_size)]
    return np.concatenate([np.asarray(part) for part in parts])


def accuracy(
    model: nnx.Module, x: Float32[np.ndarray, "images height width channels"], y: Int[np.ndarray, "images"]
) -> float:
    """Computes the share of images whose highest logit is that of their class, in [0, 1]."""
    return float(np.mean(predicted_classes(model, x) == y))
