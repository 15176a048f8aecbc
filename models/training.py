"""Trains classifiers written as `flax.nnx` modules."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray
from tqdm import tqdm

from .datasets import Dataset, Inputs
from .serialization import num_parameters

OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class Recipe:
    """Holds the settings of a training run.

    Attributes:
        epochs: Passes over the training inputs, at least 1.
        batch_size: Inputs in a step, at most the number of training inputs.
        optimizer: `"adamw"`; or `"muon"`, which makes the steps of all kernels but the last layer's nearly orthogonal
            matrices, and leaves the other parameters to Adam, with Nesterov's momentum. It needs fewer epochs.
        learning_rate: The highest step size. Muon's steps are scaled to the root mean square of Adam's.
        weight_decay: Decay of kernels for a step size of 1; other parameters, and those that `"muon"` leaves to Adam,
            do not decay.
        warmup_epochs: Epochs in which the step size grows from a tenth of its highest value, at most half of all; then
            it falls to zero along a cosine.
        label_smoothing: Probability that the targets spread evenly over all classes.
        mixup: Both parameters of the Beta distribution that pairs of images are mixed by; 0 for no mixing.
        average: Decay of the running average of weights, which is what a run returns; 0 for the last weights.
        shift: Pixels by which images are shifted at most, up or down and left or right, over a black margin.
        mirror: Whether every image is mirrored with probability 1/2; for natural images, not for digits.
        teacher: Name of a network, trained on the same data, whose class probabilities make up half of the targets
            (distillation); empty for none. They are computed once, for images that are not augmented.

    References:
        Loshchilov, Hutter (2019). Decoupled weight decay regularization. ICLR; arXiv 1711.05101. Zhang et al. (2018).
        mixup: beyond empirical risk minimization. ICLR; arXiv 1710.09412. Polyak, Juditsky (1992) for averaging.
        Touvron et al. (2021) for transformers that learn from convolutional networks. ICML; arXiv 2012.12877. Jordan et
        al. (2024). Muon: an optimizer for hidden layers in neural networks. https://kellerjordan.github.io/posts/muon.
        Liu et al. (2025), arXiv 2502.16982, for its scale.
    """

    epochs: int
    batch_size: int = 64
    optimizer: str = "adamw"
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    average: float = 0.0
    shift: int = 0
    mirror: bool = False
    teacher: str = ""

    def __post_init__(self):
        for name, lowest in (("epochs", 1), ("batch_size", 1), ("shift", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {getattr(self, name)}")
        for name in ("learning_rate", "weight_decay", "warmup_epochs", "mixup"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        for name in ("label_smoothing", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")


def fit(
    model: nnx.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    teacher: nnx.Module | None = None,
    seed: int = 0,
    progress: bool = True,
    checkpoint: Path | None = None,
    dtype: Any = None,
) -> Float32[np.ndarray, "epochs"]:
    """Trains a classifier in place on the cross-entropy, with warm-up and a cosine schedule.

    Each epoch takes the training inputs in a new order and leaves out the last incomplete batch. State other than
    parameters (running averages, dropout's keys) is updated too. Afterwards the model is in evaluation mode. Batches
    are split over as many devices as divide them, each of which has a copy of the model.

    Steps are called from Python, one by one, because XLA's CPU convolutions are about three times slower
    inside `lax.scan` (LeNet5 on two cores: 0.57 s an epoch of digits against 0.19 s).

    Args:
        model: Nnx module from images (batch, height, width, channels) or texts (batch, length) to logits (batch,
            classes); changed in place.
        dataset: The training inputs and labels.
        recipe: The settings.
        teacher: The network that the recipe names, in evaluation mode; None if it names none.
        seed: Seed of the order and the augmentation of the inputs (the initial weights are the model's own).
        progress: Whether to show a progress bar on standard error.
        checkpoint: A folder to write the state of the run to after each epoch. A run of the same recipe, seed and model
            that finds one there resumes from it, to the same weights as without interruption.
        dtype: Precision of activations and gradients; by default bfloat16 on GPUs and TPUs, float32 on CPUs. Weights
            and running averages are always float32.

    Returns:
        Mean loss in nats of each epoch, (epochs,) float32.

    Raises:
        ValueError: If the batch is larger than the data, the checkpoint is of another run, a teacher is named
            and not given, or given and not named, or texts are to be shifted, mirrored or mixed as images are.
        ImportError: If `checkpoint` is given and orbax is not installed.
    """
    num_inputs = len(dataset.x_train)
    if recipe.batch_size > num_inputs:
        raise ValueError(
            f"batch_size must be from 1 to the {num_inputs} training {dataset.noun}, got {recipe.batch_size}"
        )
    if bool(recipe.teacher) != (teacher is not None):
        raise ValueError(
            f"teacher must be the network that the recipe names, {recipe.teacher or None!r}, got "
            f"{None if teacher is None else type(teacher).__name__}; `networks.load_teacher` loads it"
        )
    if dataset.noun == "texts" and (recipe.shift or recipe.mirror or recipe.mixup):
        raise ValueError(
            f"shift, mirror and mixup are for images, got {recipe.shift}, {recipe.mirror} and {recipe.mixup} for texts"
        )
    num_steps = num_inputs // recipe.batch_size
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    num_classes = len(dataset.class_names)
    targets = optax.smooth_labels(jax.nn.one_hot(dataset.y_train, num_classes), recipe.label_smoothing)
    if teacher is not None:
        targets = (targets + jax.nn.softmax(compute_logits(teacher, dataset.x_train))) / 2
    targets = np.asarray(targets)

    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = _optimizer(recipe, num_steps, num_classes)
    state = (params, rest, optimizer.init(params), (params, rest), jnp.zeros(recipe.epochs))
    step = jax.jit(functools.partial(_step, graph, optimizer, recipe, num_steps, dtype), donate_argnums=0)

    first_epoch = 0
    checkpoints = None
    if checkpoint is not None:
        checkpoints = _Checkpoints(
            checkpoint,
            f"{type(model).__name__} of {num_parameters(model)} parameters, "
            f"{num_inputs} {dataset.noun} of shape {dataset.x_train.shape[1:]}, {jnp.dtype(dtype).name}, "
            f"seed {seed}, {recipe}",
        )
        first_epoch, state = checkpoints.restore(state)
    batch_axis, replicated = _shardings(recipe.batch_size)
    state = jax.device_put(jax.tree.map(jnp.copy, state), replicated)
    key = jax.random.key(seed)
    with tqdm(
        total=recipe.epochs * num_steps,
        initial=first_epoch * num_steps,
        desc="training",
        unit="step",
        disable=not progress,
        mininterval=1.0,
    ) as bar:
        for epoch in range(first_epoch, recipe.epochs):
            order = np.random.default_rng((seed, epoch)).permutation(num_inputs)
            for index in range(num_steps):
                batch = order[index * recipe.batch_size : (index + 1) * recipe.batch_size]
                x, y = jax.device_put((dataset.x_train[batch], targets[batch]), batch_axis)
                state = step(state, key, np.int32(epoch * num_steps + index), x, y)
                bar.update()
            bar.set_postfix(epoch=f"{epoch + 1}/{recipe.epochs}", loss=f"{float(state[-1][epoch]):.4f}")
            if checkpoints is not None:
                checkpoints.save(epoch + 1, state)
    if checkpoints is not None:
        checkpoints.close()
    *_, averages, losses = state
    nnx.update(model, *averages)
    model.eval()
    return np.asarray(losses)


def _optimizer(recipe: Recipe, num_steps: int, num_classes: int) -> optax.GradientTransformation:
    total = recipe.epochs * num_steps
    warmup = min(round(recipe.warmup_epochs * num_steps), total // 2)
    highest = recipe.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(highest / 10, highest, warmup, total)
    if recipe.optimizer == "muon":
        # Liu et al. (2025) measured the root mean square of AdamW's steps to be 0.2 to 0.4 learning rates.
        return optax.contrib.muon(
            schedule,
            weight_decay=recipe.weight_decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=lambda params: jax.tree.map(
                functools.partial(_matrix_axes, num_classes), params
            ),
        )
    return optax.adamw(
        schedule,
        weight_decay=recipe.weight_decay,
        mask=lambda params: jax.tree.map(_is_kernel, params),
    )


def _is_kernel(leaf: Array) -> bool:
    """Returns whether a parameter is the kernel of a linear layer, or of a convolution of images."""
    return leaf.ndim in (2, 4)


def _matrix_axes(num_classes: int, leaf: Array) -> optax.contrib.MuonDimensionNumbers | None:
    """Finds the axes of inputs and outputs of kernels; None for the last layer's, and for all other parameters."""
    if not _is_kernel(leaf) or (leaf.ndim == 2 and leaf.shape[1] == num_classes):
        return None
    return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)


def _step(graph, optimizer, recipe, num_steps, dtype, state, key, index, x, targets):
    """Takes a step of the run; the state is (parameters, other variables, optimizer's, averages of both, losses)."""
    params, rest, opt_state, averages, losses = state
    keys = jax.random.split(jax.random.fold_in(key, index), 2)
    x = _augment(keys[0], x, shift=recipe.shift, mirror=recipe.mirror)
    if recipe.mixup:
        x, targets = _mix(keys[1], x, targets, recipe.mixup)

    def loss(params):
        # Rebuilt, because Flax lets a variable change only under the transformation that made it.
        narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        module = nnx.merge(graph, narrow, jax.tree.map(lambda leaf: leaf, rest))
        is_image = jnp.issubdtype(x.dtype, jnp.floating)
        logits = module(x.astype(dtype) if is_image else x).astype(jnp.float32)
        return optax.softmax_cross_entropy(logits, targets).mean(), nnx.split(module, nnx.Param, ...)[2]

    (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    # The average forgets the first weights sooner than its decay alone would.
    decay = jnp.minimum(recipe.average, (1 + index) / (10 + index)) if recipe.average else 0.0
    averages = jax.tree.map(functools.partial(_average, decay), averages, (params, rest))
    return params, rest, opt_state, averages, losses.at[index // num_steps].add(value / num_steps)


def _average(decay, average, value):
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return value
    return decay * average + (1 - decay) * value


def _augment(
    key: PRNGKeyArray, x: Float[Array, "batch height width channels"], *, shift: int, mirror: bool
) -> Float[Array, "batch height width channels"]:
    """Shifts every image by up to `shift` pixels over a black margin, and mirrors it with probability 1/2."""
    shift_key, mirror_key = jax.random.split(key)
    if shift:
        padded = jnp.pad(x, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
        offsets = jax.random.randint(shift_key, (len(x), 2), 0, 2 * shift + 1)
        x = jax.vmap(lambda image, offset: jax.lax.dynamic_slice(image, (*offset, 0), x.shape[1:]))(padded, offsets)
    if mirror:
        is_mirrored = jax.random.bernoulli(mirror_key, shape=(len(x), 1, 1, 1))
        x = jnp.where(is_mirrored, x[:, :, ::-1], x)
    return x


def _mix(key, x, targets, concentration):
    """Mixes every image and its target with another of the batch, by one random share."""
    share_key, order_key = jax.random.split(key)
    share = jax.random.beta(share_key, concentration, concentration)
    order = jax.random.permutation(order_key, len(x))
    return share * x + (1 - share) * x[order], share * targets + (1 - share) * targets[order]


def _shardings(batch_size: int) -> tuple[NamedSharding, NamedSharding]:
    """Makes the sharding of a batch, over as many devices as divide it, and that of the state."""
    devices = jax.devices()
    num_devices = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    mesh = jax.sharding.Mesh(np.array(devices[:num_devices]), ("batch",))
    return NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())


class _Checkpoints:
    """Writes the states of a run to a folder, and reads the newest.

    Args:
        folder: Where they are; made if it does not exist.
        description: What the run is; those of others are refused.

    Raises:
        ImportError: If orbax is not installed.
        ValueError: If the folder has the states of another run.
    """

    def __init__(self, folder: Path, description: str):
        try:
            import orbax.checkpoint as ocp
        except ImportError as error:
            raise ImportError("checkpoint needs orbax: pip install 'jaxcode[train]'") from error
        folder = folder.absolute()
        label = folder / "run.txt"
        if label.exists() and label.read_text() != description:
            raise ValueError(
                f"checkpoint {folder} is of another run ({label.read_text()}); delete it, or name another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        label.write_text(description)
        self._args = ocp.args
        self._manager = ocp.CheckpointManager(
            folder / "states",
            options=ocp.CheckpointManagerOptions(max_to_keep=2),
            item_handlers=ocp.StandardCheckpointHandler(),
        )

    def restore(self, state):
        """Reads the newest state; returns it with the number of finished epochs, or 0 and the given one."""
        epoch = self._manager.latest_step()
        if epoch is None:
            return 0, state
        leaves, structure = jax.tree.flatten(state)
        stored = self._manager.restore(epoch, args=self._args.StandardRestore(_number(leaves)))
        leaves = [_from_data(stored[str(i)], leaf) if str(i) in stored else leaf for i, leaf in enumerate(leaves)]
        return epoch, jax.tree.unflatten(structure, leaves)

    def save(self, epoch: int, state) -> None:
        """Writes a state; only the newest two are kept."""
        self._manager.save(epoch, args=self._args.StandardSave(_number(jax.tree.leaves(state))))

    def close(self) -> None:
        """Waits until the last state is written."""
        self._manager.close()


def _number(leaves):
    """Names leaves by their index, except empty ones, which orbax cannot store; of random keys, their data."""
    return {
        str(i): jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for i, leaf in enumerate(leaves)
        if leaf.size
    }


def _from_data(data, leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return data


def compute_logits(model: nnx.Module, x: Inputs) -> Float32[np.ndarray, "inputs classes"]:
    """Computes a classifier's logits of any number of inputs, 500 at a time."""
    graph, state = nnx.split(model)
    apply = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    parts = [apply(state, x[start : start + 500]) for start in range(0, len(x), 500)]
    return np.concatenate([np.asarray(part) for part in parts])


def predicted_classes(model: nnx.Module, x: Inputs) -> Int[np.ndarray, "inputs"]:
    """Computes the class with the highest logit, for every input."""
    return np.argmax(compute_logits(model, x), axis=-1)


def accuracy(model: nnx.Module, x: Inputs, y: Int[np.ndarray, "inputs"]) -> float:
    """Computes the share of inputs whose highest logit is that of their class, in [0, 1]."""
    return float(np.mean(predicted_classes(model, x) == y))
