"""Distils a surrogate from a model's answers to unlabelled inputs."""

import dataclasses
import functools
import math
from typing import final

import jax
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Float, PyTree

from .._batched_model import BatchedModel
from ..checks import batch_size, check_positive
from ..functions import Model, as_pure_function, call
from . import students
from .augmentation import augment, natural_changes
from .calibration import calibrate_disagreement, calibrate_squared_error
from .features import ModuleFeatures, draw_fourier, draw_patches, flatten_inputs, mean_and_scale
from .predictors import Layout, LinearPredictor, ModulePredictor, Predictor, Surrogate
from .ridge import fit_ridge
from .training import BATCH, train

_MODEL_BATCH = 128
# Inputs that features are computed of at a time, which is cheaper than running the model.
_FEATURE_BATCH = 500
# Length scales of Fourier features that are tried, in units of the median distance of two inputs.
_LENGTHS = (0.25, 0.5, 1.0, 2.0)
_MAX_FEATURES = 2000
# With fewer inputs a network learns less than ridge regression does.
_LEAST_FOR_STUDENT = 500
_HELD_OUT_SHARE = 0.1
_HELD_OUT_LIMITS = 200, 2000
# Multiplications that a network's training may take: about a minute and a half of two cores.
_TRAINING_MULTIPLICATIONS = 2e12
_MAX_EPOCHS = 60
_LEAST_STEPS = 500
_MAX_STEPS = 4000
_MAX_WIDTH = 512
# Inputs from which the mean and the scale of images are taken.
_NUM_SAMPLE = 1000
# Changed copies of inputs that the model answers, at most, and at most so many for each input.
_MAX_COPIES = 24_000
_COPIES_PER_INPUT = 7


def surrogate(
    f: Model,
    inputs: PyTree[ArrayLike],
    *,
    model: nnx.Module | None = None,
    features: Model | None = None,
    cost: float = 0.1,
    seed: int = 0,
    progress: bool = True,
) -> Surrogate:
    r"""Distils a cheap model of a model from its answers to unlabelled inputs.

    The surrogate is the decoder's prior: `jaxcode.coded(f, code, prior=surrogate)` returns its guess for an input that
    is lost. It knows how good each guess is, by which redundant workers are given to the inputs that need them.

    What it is depends on the inputs. Images (one leaf of shape (B, height, width, channels)) get a small convolutional
    network, trained also on mirrored and shifted copies if f answers them alike, and f itself answers the copies. Fewer
    than 500 images get ridge regression on responses to random patches. Sequences of tokens (a leaf of integers
    (B, length)) get embeddings, a convolution over neighbours and means and maxima over the sequence. Beside them there
    may be masks or types of the tokens (leaves of booleans, or of integers of which none is above 1, of the same
    shape), other numbers, and more sequences, such as the query and the document of a reranker; of these, new pairs are
    learned from too, if f's answers to them are distributed like those to the inputs. For all else, the numbers of an
    input are one vector, and the best of ridge regression on random Fourier features of several length
    scales and a perceptron is kept. Networks are trained for about a minute and a half of two cores at most.

    A tenth of the inputs, at least 200 if there are so many, is held out: on these, candidates are compared and the
    errors of a network's guesses are calibrated. Ridge regression is calibrated on guesses for inputs left out.

    Args:
        f: The model, as `jaxcode.coded` takes it, whose answers are floating-point numbers.
        inputs: Unlabelled inputs as they will come, leaves (B, ...), at least 20; a few thousand are better. Those that
            f was trained on make the surrogate surer of its guesses than it is on others.
        model: A network to train instead: an `nnx.Module` from a batch to answers like f's. It is copied.
        features: Computes features of a batch, in which the answers are then fitted by ridge regression: an early
            layer of f, for instance. As f: a callable, a module or a pair.
        cost: Operations for an input that the default kinds may take, relative to f's. Where none is so cheap, of a
            very small model, the cheapest is kept.
        seed: Seed of the initial weights, of the inputs held out and of the copies.
        progress: Whether to show progress bars on standard error.

    Returns:
        The surrogate: `prior(x)` guesses, `prior.with_risk(x, loss)` also tells what each guess is expected to cost,
        `prior.cost` is the compiler's count of its operations over that of f's (operations inside a loop count once).

    Raises:
        ValueError: If inputs are fewer than 20 or their leading axes differ, cost is not positive, f is no model or
            its answers are not floating-point numbers, or features or model do not return one row for each input.

    References:
        Hinton, Vinyals and Dean, arXiv 1503.02531, for distillation; `jaxcode.surrogates` for the parts.

    >>> import jax.numpy as jnp
    >>> x = jnp.linspace(0.0, 3.0, 200)[:, None]
    >>> prior = surrogate(lambda x: jnp.sin(x), x, cost=1000.0, progress=False)
    >>> bool(jnp.max(jnp.abs(prior(x) - jnp.sin(x))) < 0.01)
    True
    """
    if model is not None and features is not None:
        raise ValueError("model and features are both given; expected one of them")
    check_positive("cost", cost, "give the share of the model's operations that the surrogate may take, e.g. 0.1")
    size = batch_size("inputs", inputs)
    if size < 20:
        raise ValueError(f"inputs has {size} inputs; expected at least 20, better a few thousand")
    teacher = _Teacher(f, jax.tree.map(np.asarray, inputs), progress)
    num_held_out = int(np.clip(_HELD_OUT_SHARE * size, min(_HELD_OUT_LIMITS[0], size // 4), _HELD_OUT_LIMITS[1]))
    held_out = np.random.default_rng(seed).permutation(size)[:num_held_out]
    if model is not None:
        fits = [_fit_student(teacher, model, held_out, seed, progress)]
    elif features is not None:
        fits = [_fit_linear(teacher, ModuleFeatures(*as_pure_function(features)), held_out)]
    else:
        fits = _fit_default(teacher, cost, held_out, seed, progress)
    best = min(fits, key=lambda fit: fit.loss)
    squares = np.mean((best.guesses - best.targets) ** 2, axis=1)
    return Surrogate(
        best.predictor,
        calibrate_disagreement(best.guesses, best.targets) if teacher.layout.is_class_scores else None,
        calibrate_squared_error(best.scores, squares),
        teacher.layout,
        teacher.relative_cost(best.predictor),
    )


@final
@dataclasses.dataclass(frozen=True, eq=False)
class _Fit:
    """Holds a predictor and what it guesses for inputs that it was not fitted to.

    Attributes:
        predictor: The predictor.
        loss: Of its guesses for the inputs held out: the share of other classes if answers are class scores, else the
            mean squared error.
        guesses: Guesses as rows, (n, numbers).
        targets: The model's answers to the same inputs, (n, numbers).
        scores: Scores of the guesses, (n,).
    """

    predictor: Predictor
    loss: float
    guesses: Float[np.ndarray, "rows numbers"]
    targets: Float[np.ndarray, "rows numbers"]
    scores: Float[np.ndarray, "rows"]


@final
class _Teacher:
    """Holds a model, a sample of its inputs and its answers to them.

    Args:
        f: The model.
        inputs: Leaves (B, ...).
        progress: Whether to show a progress bar on standard error.
    """

    def __init__(self, f: Model, inputs: PyTree[np.ndarray], progress: bool):
        self.inputs, self.size = inputs, batch_size("inputs", inputs)
        self._fn, self._params = as_pure_function(f)
        self._model = BatchedModel(self._fn, self._params, min(_MODEL_BATCH, self.size))
        self._progress = progress
        answers = self._model(inputs, progress=progress)
        self.layout = Layout.of(answers)
        self.rows = np.asarray(flatten_inputs(answers))

    def loss(self, guesses: Float[np.ndarray, "rows numbers"], targets: Float[np.ndarray, "rows numbers"]) -> float:
        """Computes the share of guesses of another class if answers are class scores, else the mean squared error."""
        if self.layout.is_class_scores:
            return float(np.mean(guesses.argmax(axis=1) != targets.argmax(axis=1)))
        return float(np.mean((guesses - targets) ** 2))

    def answer(self, inputs: PyTree[np.ndarray]) -> Float[np.ndarray, "batch numbers"]:
        """Computes the answers to more inputs, as rows."""
        return np.asarray(flatten_inputs(self._model(inputs, progress=self._progress)))

    @functools.cached_property
    def operations(self) -> float:
        """Operations that the model takes for an input."""
        return _count_operations(self._fn, self._params, self.inputs)

    def relative_cost(self, predictor: Predictor) -> float:
        """Computes a predictor's operations for an input over the model's."""
        return _count_operations(call, predictor, self.inputs) / self.operations


def _count_operations(fn, params, inputs):
    """Counts the compiler's floating-point operations for an input; those inside loops count once."""

    def describe(leaf):
        return jax.ShapeDtypeStruct((16, *leaf.shape[1:]), jax.dtypes.canonicalize_dtype(leaf.dtype))

    batch = jax.tree.map(describe, inputs)
    analysis = jax.jit(fn).lower(params, batch).cost_analysis()
    assert analysis is not None
    return max(analysis.get("flops", 0.0) + analysis.get("transcendentals", 0.0), 1.0) / 16


def _fit_default(teacher, cost, held_out, seed, progress) -> list[_Fit]:
    """Fits what suits the inputs: ridge regression on random features, and a small network if there are enough."""
    leaves = jax.tree.leaves(teacher.inputs)
    is_images = len(leaves) == 1 and leaves[0].ndim == 4
    is_tokens = students.has_tokens(teacher.inputs)
    fits = []
    if teacher.size >= _LEAST_FOR_STUDENT or is_tokens:
        student, architecture = _make_student(teacher, cost, is_images, is_tokens, seed)
        fits.append(_fit_student(teacher, student, held_out, seed, progress, architecture))
    if is_images and not fits:
        draws = [lambda count: draw_patches(teacher.inputs, count, seed)]
    elif is_images or is_tokens:
        draws = []
    else:
        draws = [lambda count, length=length: draw_fourier(teacher.inputs, count, length, seed) for length in _LENGTHS]
    if draws:
        count = _affordable(teacher, draws[0], cost)
        fits += [_fit_linear(teacher, draw(count), held_out) for draw in draws]
    costs = [teacher.relative_cost(fit.predictor) for fit in fits]
    # Of a small model there may be none that is cheaper by so much.
    limit = max(cost, min(costs))
    return [fit for fit, fit_cost in zip(fits, costs, strict=True) if fit_cost <= limit]


def _make_student(teacher, cost, is_images, is_tokens, seed):
    """Makes the widest network that meets the cost and can be trained on enough inputs, and describes it."""
    multiplications = min(cost * teacher.operations / 2, _TRAINING_MULTIPLICATIONS / (3 * BATCH * _LEAST_STEPS))
    num_outputs = teacher.rows.shape[1]
    num_tokens = ()
    if is_images:
        (leaf,) = jax.tree.leaves(teacher.inputs)
        kind, sample = "image", leaf[:_NUM_SAMPLE].astype(np.float32)
        width = students.image_width(leaf.shape[1:3], leaf.shape[3], num_outputs, multiplications)
    elif is_tokens:
        kind, sample, num_tokens = "token", teacher.inputs, students.count_tokens(teacher.inputs)
        width = students.token_width(sample, num_outputs, multiplications)
    else:
        kind, sample = "vector", np.asarray(flatten_inputs(teacher.inputs))
        width = students.vector_width(sample.shape[1], num_outputs, multiplications)
    width = min(width, _MAX_WIDTH)
    # The compiler counts more than multiplications.
    while True:
        network = students.STUDENTS[kind](sample, teacher.rows, width, rngs=nnx.Rngs(seed))
        network.eval()
        relative = _count_operations(*as_pure_function(network), teacher.inputs) / teacher.operations
        if relative <= cost or width == 1:
            shapes = tuple(leaf.shape[1:] for leaf in jax.tree.leaves(sample))
            return network, students.Architecture(kind, shapes, num_outputs, width, num_tokens)
        width = max(1, min(width - 1, int(width * math.sqrt(cost / relative))))


def _fit_student(teacher, student, held_out, seed, progress, architecture=None) -> _Fit:
    """Trains a network on all inputs but those held out."""
    learned = np.setdiff1d(np.arange(teacher.size), held_out)
    inputs, others = (jax.tree.map(lambda leaf, r=rows: leaf[r], teacher.inputs) for rows in (learned, held_out))
    targets, other_targets = teacher.rows[learned], teacher.rows[held_out]
    if architecture is not None and architecture.kind != "vector":
        rng = np.random.default_rng(seed)
        changes = natural_changes(inputs, targets, teacher.answer, rng)
        num_copies = min(_COPIES_PER_INPUT * len(learned), _MAX_COPIES)
        inputs, targets = augment(inputs, targets, teacher.answer, changes, num_copies, rng)
        # Copies of inputs held out make their calibration less noisy.
        num_copies = min(_COPIES_PER_INPUT * len(held_out), max(0, _HELD_OUT_LIMITS[1] - len(held_out)))
        others, other_targets = augment(others, other_targets, teacher.answer, changes, num_copies, rng)
    fn, params = as_pure_function(student)
    operations = _count_operations(fn, params, teacher.inputs)
    affordable = _TRAINING_MULTIPLICATIONS / (3 * BATCH * operations / 2)
    most = min(affordable, _MAX_STEPS, _MAX_EPOCHS * len(targets) / BATCH)
    num_steps = int(max(_LEAST_STEPS, most))
    trained = train(
        student,
        inputs,
        targets,
        num_steps=num_steps,
        is_class_scores=teacher.layout.is_class_scores,
        seed=seed,
        progress=progress,
    )
    fn, params = as_pure_function(trained)
    mean, scale = mean_and_scale(np.asarray(flatten_inputs(inputs)))
    predictor = ModulePredictor(fn, params, mean, scale, np.zeros(2 * targets.shape[1] + 2, np.float32), architecture)
    guesses, terms = BatchedModel(ModulePredictor.rows_and_terms, predictor, min(_FEATURE_BATCH, len(other_targets)))(
        others
    )
    fit = fit_ridge(terms, _log_errors(guesses, other_targets)[:, None])
    predictor = dataclasses.replace(predictor, error_weights=np.float32(fit.weights[:, 0]))
    loss = teacher.loss(guesses[: len(held_out)], other_targets[: len(held_out)])
    return _Fit(predictor, loss, guesses, other_targets, fit.left_out[:, 0] - fit.offset[0])


def _fit_linear(teacher, features, held_out) -> _Fit:
    """Fits ridge regression to all inputs; each guess is that of a fit to the others."""
    rows = BatchedModel(call, features, min(_FEATURE_BATCH, teacher.size))(teacher.inputs)
    fit = fit_ridge(rows, teacher.rows)
    errors = fit_ridge(rows, _log_errors(fit.left_out, teacher.rows)[:, None])
    weights = np.concatenate([fit.weights, errors.weights], axis=1)
    offset = np.concatenate([fit.offset, errors.offset])
    predictor = LinearPredictor(features, weights.astype(np.float32), offset.astype(np.float32))
    loss = teacher.loss(fit.left_out[held_out], teacher.rows[held_out])
    return _Fit(predictor, loss, fit.left_out, teacher.rows, errors.left_out[:, 0])


def _log_errors(guesses, targets):
    """Computes logarithms of mean squared errors, not below that of rounding errors."""
    squares = np.mean((guesses - targets) ** 2, axis=1, dtype=np.float64)
    return np.log(squares + 1e-12 * max(float(np.var(targets)), 1e-30))


def _affordable(teacher, draw, cost) -> int:
    """Returns how many random features there may be so that a linear predictor of them meets the cost."""
    costs = []
    for count in (8, 16):
        features = draw(count)
        width = jax.eval_shape(features, jax.tree.map(lambda leaf: leaf[:1], teacher.inputs)).shape[1]
        weights = np.zeros((width, teacher.rows.shape[1] + 1), np.float32)
        costs.append(teacher.relative_cost(LinearPredictor(features, weights, weights[0])))
    slope = (costs[1] - costs[0]) / 8
    return int(np.clip(8 + (cost - costs[0]) / slope, 1, _MAX_FEATURES))
