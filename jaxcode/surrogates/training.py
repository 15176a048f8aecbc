"""Trains networks on a model's answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, PyTree
from tqdm import tqdm

from ..functions import Params, PureFunction
from .features import flatten_inputs

# Inputs in a step.
BATCH = 64
_LEARNING_RATE = 0.02
_WEIGHT_DECAY = 1e-4
_WARMUP = 0.1
# The first rate of a round of further training, which falls to zero.
_FINE_RATE = 0.005
# The root mean square of Adam's steps, in learning rates; Muon's steps are scaled to it.
_CONSISTENT_RMS = 0.2
# Of the squared error, beside the divergence of classes.
_SQUARED_ERROR_WEIGHT = 0.1


def train(
    module: nnx.Module,
    inputs: PyTree[np.ndarray],
    targets: Float32[np.ndarray, "batch numbers"],
    *,
    num_steps: int,
    is_class_scores: bool,
    seed: int,
    progress: bool,
) -> nnx.Module:
    """Trains a copy of a network on a model's answers.

    The loss is `distillation_loss`. Kernels take Muon's steps, all other parameters Adam's.

    Args:
        module: From a batch to answers like the model's.
        inputs: Leaves (B, ...).
        targets: The model's answers to them, as rows.
        num_steps: Steps of 64 inputs.
        is_class_scores: Whether answers are scores of classes.
        seed: Seed of the inputs' order.
        progress: Whether to show a progress bar on standard error.

    Returns:
        The network in evaluation mode.

    References:
        Hinton, Vinyals and Dean, arXiv 1503.02531, for distillation. Jordan et al., Muon (2024); Liu et al., arXiv
        2502.16982, for its scale.
    """
    module = nnx.clone(module)
    module.train()
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    schedule = optax.warmup_cosine_decay_schedule(
        _LEARNING_RATE / 10, _LEARNING_RATE, max(1, int(_WARMUP * num_steps)), num_steps
    )
    optimizer = make_optimizer(schedule, targets.shape[1])
    scale = np.float32(targets.std() or 1.0)
    size = len(targets)
    batch_size = min(BATCH, size)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, x, y):
        params, rest, optimizer_state = state

        def loss(params):
            student = nnx.merge(graph, params, rest, copy=True)
            value = distillation_loss(flatten_inputs(student(x)), y, scale, is_class_scores)
            return value, nnx.split(student, nnx.Param, ...)[2]

        (value, rest), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return (optax.apply_updates(params, updates), rest, optimizer_state), value

    state = jax.tree.map(jnp.array, (params, rest, optimizer.init(params)))
    rng = np.random.default_rng(seed)
    order = np.empty(0, int)
    value = jnp.zeros(())
    for index in tqdm(range(num_steps), desc="distilling", unit="step", disable=not progress, mininterval=1.0):
        if len(order) < batch_size:
            order = rng.permutation(size)
        rows, order = order[:batch_size], order[batch_size:]
        state, value = step(state, jax.tree.map(lambda leaf, rows=rows: leaf[rows], inputs), targets[rows])
        if index % 16 == 15:
            value.block_until_ready()
    trained = nnx.merge(graph, *state[:2])
    trained.eval()
    return trained


def fine_tune(
    fn: PureFunction,
    params: Params,
    inputs: PyTree[np.ndarray],
    targets: Float32[np.ndarray, "batch numbers"],
    *,
    num_steps: int,
    is_class_scores: bool,
    seed: int,
) -> Params:
    """Trains a network on in evaluation mode, with small steps.

    The number of steps and of inputs may change without another compilation.

    Args:
        fn: From parameters and a batch to answers like the model's.
        params: The network's state, of which the parameters (`nnx.Param`) are trained.
        inputs: As for `train`.
        targets: As for `train`.
        num_steps: As for `train`.
        is_class_scores: As for `train`.
        seed: As for `train`.

    Returns:
        The new state.
    """
    trained, rest = nnx.split_state(params, nnx.Param, ...)
    scale = jnp.float32(targets.std() or 1.0)
    optimizer_state = _fine_tuner(targets.shape[1]).init(trained)
    rng = np.random.default_rng(seed)
    for index in range(num_steps):
        rows = rng.integers(len(targets), size=BATCH)
        batch = jax.tree.map(lambda leaf, rows=rows: leaf[rows], (inputs, targets))
        rate = jnp.float32(_FINE_RATE * (1 - index / num_steps))
        trained, optimizer_state = _fine_step(fn, is_class_scores, trained, rest, optimizer_state, *batch, scale, rate)
    return nnx.merge_state(trained, rest)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fine_step(fn, is_class_scores, trained, rest, optimizer_state, x, y, scale, rate):
    def loss(trained):
        guesses = flatten_inputs(fn(nnx.merge_state(trained, rest), x))
        return distillation_loss(guesses, y, scale, is_class_scores)

    updates, optimizer_state = _fine_tuner(y.shape[1]).update(jax.grad(loss)(trained), optimizer_state, trained)
    return optax.apply_updates(trained, jax.tree.map(lambda update: rate * update, updates)), optimizer_state


def distillation_loss(
    guesses: Float[ArrayLike, "batch numbers"],
    targets: Float[ArrayLike, "batch numbers"],
    scale: ArrayLike,
    is_class_scores: bool,
) -> Float[Array, ""]:
    """Computes what training minimises, which is least at the model itself.

    Args:
        guesses: As rows.
        targets: The model's answers, as rows.
        scale: The unit of both.
        is_class_scores: Whether they are scores of classes.

    Returns:
        The mean squared error in the unit; for class scores a tenth of it and the mean Kullback-Leibler divergence of
        the classes' probabilities.
    """
    value = jnp.mean(jnp.square((jnp.asarray(guesses) - targets) / scale))
    if is_class_scores:
        divergence = optax.losses.kl_divergence(jax.nn.log_softmax(guesses), jax.nn.softmax(targets))
        value = _SQUARED_ERROR_WEIGHT * value + jnp.mean(divergence)
    return value


def make_optimizer(rate: optax.ScalarOrSchedule, num_outputs: int) -> optax.GradientTransformation:
    """Makes the optimiser: Muon for kernels, but that of the last layer, and Adam for all other parameters."""
    return optax.contrib.muon(
        rate,
        weight_decay=_WEIGHT_DECAY,
        adam_weight_decay=0.0,
        consistent_rms=_CONSISTENT_RMS,
        muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(
            functools.partial(_matrix_axes, num_outputs), params
        ),
    )


@functools.cache
def _fine_tuner(num_outputs):
    """Makes the optimiser whose steps are those of a rate of 1."""
    return make_optimizer(1.0, num_outputs)


def _matrix_axes(num_outputs, path, leaf):
    """Finds the axes of inputs and outputs of kernels; None for the last layer's, and for all other parameters."""
    names = {getattr(entry, "key", getattr(entry, "name", None)) for entry in path}
    if "kernel" not in names or leaf.ndim < 2 or (leaf.ndim == 2 and leaf.shape[1] == num_outputs):
        return None
    return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)
