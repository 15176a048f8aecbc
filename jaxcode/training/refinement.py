"""Fine-tunes a code and a prior on the loss of what is decoded."""

import dataclasses
import functools
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import PyTree
from tqdm import trange

from .._batched_model import BatchedModel
from .._coded import Coded, coded
from ..allocation import find_planner, lost_probability
from ..checks import batch_size as batch_size_of
from ..checks import check_count
from ..codes import AbstractCode, KernelCode, ReplicationCode
from ..codes.abstract import mixes_inputs
from ..functions import Model, as_pure_function, call
from ..ordering import Ordering
from ..outputs import OutputSpace, as_returned
from ..stragglers import AbstractStragglers
from ..surrogates import Surrogate
from ..surrogates.calibration import DISAGREEMENT, SQUARED_ERROR, calibrate_disagreement, calibrate_squared_error
from ..surrogates.features import flatten_inputs
from ..surrogates.training import make_optimizer
from ..tuning.evaluation import standard_error
from ..tuning.losses import LOSSES
from .objective import Objective, draw_sets, split_batches
from .parameters import Parameters, code_parameters, prior_parameters, to_device, to_host

_MODEL_BATCH = 128
# Of the batches of the sample, for comparison; they are not trained on.
_HELD_OUT = 0.25
# Groups in a step, about; of a larger batch, one batch.
_GROUPS_IN_STEP = 8
# Straggler sets in a step: of codes that copy inputs each costs next to nothing.
_SETS_MIXED, _SETS_COPIED = 8, 32
_COMPARISON_SETS = 64
# First learning rates, which fall to zero: of the code's parameters, in logarithms and in distances between nodes, and
# of the prior's, a tenth of the one by which it was distilled.
_CODE_RATE = 0.05
_PRIOR_RATE = 0.002
# A gain counts from so many standard errors.
_SIGNIFICANT = 2.0
# Losses below such a share of the mean count as alike.
_FLOOR = 1e-3
# Guesses from which the prior's risk is calibrated again.
_LEAST_TO_CALIBRATE = 200


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Refined:
    """Holds a code and a prior that `refine` trained, or those it was given if they were not found to be better.

    Attributes:
        code: The code.
        prior: The prior; None without one.
        order: In which order a batch is grouped.
        output: In which space answers are decoded.
        stragglers: Which workers are late, if copies are placed by the prior's risk; else None.
        loss: The name of the loss.
        is_better: Whether code and prior were trained; False if they are those given.
        before: The loss of those given, on the inputs held out.
        after: The loss of those trained, on the same inputs under the same straggler sets.
        error: The standard error of the difference.
    """

    code: AbstractCode
    prior: Surrogate | None
    order: Ordering | None
    output: OutputSpace
    stragglers: AbstractStragglers | None
    loss: str
    is_better: bool
    before: float
    after: float
    error: float

    def coded(self, f: Model) -> Coded:
        """Makes a coded model of the model that they were trained for, or one like it; see `jaxcode.coded`."""
        return coded(f, **self.setup())

    def setup(self) -> dict[str, Any]:
        """Returns the keyword arguments that `jaxcode.coded` and `jaxcode.CodedServer` share."""
        return {name: getattr(self, name) for name in ("code", "order", "output", "prior", "stragglers", "loss")}

    def __str__(self) -> str:
        verdict = "kept" if self.is_better else "not kept"
        change = f"{self.after / self.before - 1:+.1%}" if self.before else "no loss"
        return (
            f"{self.loss} on inputs held out {self.before:.4g}, trained {self.after:.4g} ({change}, standard error "
            f"of the difference {self.error:.2g}): {verdict}"
        )


def refine(
    f: Model,
    code: AbstractCode,
    inputs: PyTree[ArrayLike],
    stragglers: AbstractStragglers,
    *,
    prior: Surrogate | None = None,
    order: Ordering | None = None,
    output: OutputSpace = as_returned,
    loss: str = SQUARED_ERROR,
    batch_size: int | None = None,
    steps: int = 200,
    seed: int = 0,
    progress: bool = True,
) -> Refined:
    r"""Fine-tunes a code and its prior on the loss of what is decoded under straggler sets drawn at every step.

    Of an `InterpolatingCode` the nodes are trained, and those smoothings that are above zero; of a `KernelCode` the
    metric of the inputs and the process by which answers are decoded, which then need not be fitted to the answers of
    each batch; of a `Surrogate` the weights. All of them take the gradient of one number,

    .. math:: \operatorname{E}_{\mathcal{S}} \, \ell(\operatorname{dec}(f(\operatorname{enc}(x)), \mathcal{S}), f(x))

    through encoder, model, decoder and prior, by Adam, and by Muon for a network's matrices. There are no labels: what
    is decoded is compared with the model's own answers. For squared error that is the loss itself; for disagreement,
    which has no gradient, the loss by which surrogates are distilled. The model is differentiated only where coded
    inputs move with the code, those of nodes on a curve; where workers copy inputs, it runs once on each input.

    Kernel codes gain most: what many requests say about the metric, one request's few answers cannot. Nodes on a curve
    hardly find better places than `jaxcode.tune` offers. A surrogate by whose risk copies are placed gains no more than
    from being trained on all guesses alike, and far less than from being distilled anew from these inputs too
    (`python -m models.refine`, without and with `--dataset cifar10`).

    A quarter of the batches is held out. What was trained is kept only if these lose less, by more than two standard
    errors over groups of inputs and straggler sets, of the losses or of their logarithms, as a few groups may have most
    of the loss; otherwise code and prior are returned as they were given.

    Args:
        f: The model, as `jaxcode.coded` takes it.
        code: The code to start from, such as `jaxcode.tune` chose. A `ReplicationCode` has nothing to train but its
            prior; copies are then placed by the prior's risk.
        inputs: Unlabelled inputs as they will come, leaves (B, ...), at least four batches; consecutive ones form a
            batch. Best others than those that a prior was distilled from, as it guesses those too well.
        stragglers: Which workers are late, such as `jaxcode.stragglers.Uniform(5)`.
        prior: Guesses f's answers, and is trained along.
        order: As for `jaxcode.coded`.
        output: As for `jaxcode.coded`.
        loss: "squared_error", the sum over an answer's numbers; or "disagreement", of a classifier.
        batch_size: How many inputs come at a time, at least num_data, which is taken if not given.
        steps: Steps of training, each of about eight groups.
        seed: Of the inputs held out, of the batches' order and of the straggler sets.
        progress: Whether to show a progress bar on standard error.

    Returns:
        Code and prior, the losses before and after, and `coded(f)`, which uses them.

    Raises:
        ValueError: If code and prior have nothing to train, the inputs are fewer than four batches, loss is unknown or
            needs class scores that f does not return, numbers are not whole or too small, or arguments do not suit
            `jaxcode.coded`.

    References:
        Snelson and Ghahramani, NIPS 2005, and Wilson et al., arXiv 1511.02222, train a kernel's metric by marginal
        likelihood; here it is trained by the loss of what is decoded.

    >>> from jaxcode import KernelCode, stragglers
    >>> x = np.random.default_rng(0).uniform(size=(320, 2)).astype(np.float32)
    >>> f = lambda x: jnp.sin(6 * x[:, :1]) + 0.1 * x[:, 1:]  # hardly depends on the second number
    >>> code = KernelCode(8, 12, mixes=False)
    >>> refined = refine(f, code, x, stragglers.Uniform(2), steps=40, progress=False)
    >>> refined.is_better, refined.after < 0.5 * refined.before
    (True, True)
    """
    sample = _check_sample(f, code, inputs, loss, batch_size, seed, progress)
    check_count("steps", steps)
    if not isinstance(stragglers, AbstractStragglers):
        raise ValueError(f"stragglers is {stragglers!r}; expected a model such as jaxcode.stragglers.Uniform(5)")
    late = stragglers if prior is not None and isinstance(code, ReplicationCode) else None
    find_planner(code, prior, late, loss)
    lost = None if late is None else lost_probability(late, code.num_workers)
    fn, params = as_pure_function(f)
    objective = Objective(fn, order, output, loss, lost, sample.scale)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        evaluate = _make_evaluation(objective, params, code, prior, stragglers, sample.held_out, seed)
        before = evaluate(code, prior)
        moved = code_parameters(code, lambda: _kernel_features(code, sample.learned[0]))
        guess = prior_parameters(prior)
        if moved.values is None and guess.values is None:
            raise ValueError(
                f"code is {type(code).__name__} and prior is {prior!r}, which have no parameters to train; expected an "
                "InterpolatingCode, a KernelCode, or a prior"
            )
        trained_code, trained_prior = _train(
            objective, params, moved, guess, stragglers, sample.learned, steps, seed, progress
        )
        if prior is not None and trained_prior is not None:
            trained_prior = _calibrate(trained_prior, *sample.held_out)
        after = evaluate(trained_code, trained_prior)
    error = standard_error(before - after)
    is_better = _is_better(before, after)
    if is_better:
        code, prior = trained_code, trained_prior
    losses = float(before.mean()), float(after.mean())
    return Refined(code, prior, order, output, late, loss, is_better, *losses, float(error))


def _is_better(before, after):
    """Returns whether losses, (sets, groups), are lower after than before by more than chance; not if any is NaN."""
    floor = _FLOOR * before.mean() + np.finfo(np.float64).tiny
    with np.errstate(invalid="ignore"):
        gain, ratio = before - after, np.log(before + floor) - np.log(after + floor)
    is_significant = any(gains.mean() > _SIGNIFICANT * standard_error(gains) for gains in (gain, ratio))
    return bool(gain.mean() > 0 and is_significant)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class _Sample:
    """Holds a sample of inputs and the model's answers, in batches: leaves (batches, batch_size, ...).

    Attributes:
        learned: Inputs and answers that are trained on.
        held_out: Those that are not.
        scale: The unit of the answers.
    """

    learned: tuple[PyTree[np.ndarray], PyTree[np.ndarray]]
    held_out: tuple[PyTree[np.ndarray], PyTree[np.ndarray]]
    scale: float


def _check_sample(f, code, inputs, loss, batch_size, seed, progress) -> _Sample:
    """Checks the arguments, computes the model's answers and holds batches out."""
    if not isinstance(code, AbstractCode):
        raise ValueError(
            f"code is {code!r}; expected a code such as SplineCode.systematic(num_data=20, num_workers=30)"
        )
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; expected one of {', '.join(LOSSES)}")
    size = batch_size_of("inputs", inputs)
    batch_size = check_count("batch_size", code.num_data if batch_size is None else batch_size, least=code.num_data)
    num_batches = size // batch_size
    if num_batches < 4:
        raise ValueError(f"inputs has {size} inputs; expected at least four batches of {batch_size}")
    inputs = jax.tree.map(np.asarray, inputs)
    model = BatchedModel(*as_pure_function(f), min(_MODEL_BATCH, size), allow_integers=not mixes_inputs(code))
    targets = model(inputs, progress=progress)
    leaves = jax.tree.leaves(targets)
    if loss == DISAGREEMENT and (len(leaves) != 1 or leaves[0].ndim != 2 or leaves[0].shape[1] < 2):
        raise ValueError(f"loss is {loss!r}, but f returned {jax.tree.map(np.shape, targets)}; expected class scores")
    batches = split_batches((inputs, targets), batch_size, num_batches)
    permutation = np.random.default_rng(seed).permutation(num_batches)
    num_held_out = max(2, round(_HELD_OUT * num_batches))
    held_out, learned = np.sort(permutation[:num_held_out]), np.sort(permutation[num_held_out:])
    rows = np.concatenate([np.float32(leaf).reshape(size, -1) for leaf in leaves], axis=1)
    parts = [jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], batches) for chosen in (learned, held_out)]
    return _Sample(parts[0], parts[1], float(rows.std()) or 1.0)


def _kernel_features(code, x):
    """Computes a kernel code's features of batches of inputs, without its metric."""
    assert isinstance(code, KernelCode)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), x)
    return np.asarray(dataclasses.replace(code, metric=None)._features_of(flat))


def _make_evaluation(objective, params, code, prior, stragglers, batches, seed):
    """Makes the function that measures a code and a prior on batches, (masks, groups of all batches)."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    masks, counts = draw_sets(_COMPARISON_SETS, code.num_workers, stragglers, prior is not None, key)
    masks = masks[np.asarray(counts)]
    if len(masks) < 2:
        raise ValueError(
            f"stragglers is {stragglers!r}, which leaves fewer than two answers; expected more that return"
        )

    @jax.jit
    def measure(code, prior, x, targets):
        return objective.measured(code, prior, params, x, targets, masks)

    def evaluate(code, prior):
        losses = [
            np.asarray(measure(code, prior, *jax.tree.map(lambda leaf, i=i: leaf[i], batches)), np.float64)
            for i in range(batch_size_of("inputs", batches))
        ]
        return np.concatenate(losses, axis=1)

    return evaluate


def _train(objective, params, moved: Parameters, guess: Parameters, stragglers, batches, steps, seed, progress):
    """Trains from the best of the starts; returns code and prior."""
    num_batches, batch_size = jax.tree.leaves(batches)[0].shape[:2]
    code = moved.build(moved.values, moved.starts[0], np)
    has_prior = guess.build(guess.values, (), np) is not None
    num_sets = _SETS_MIXED if mixes_inputs(code) else _SETS_COPIED
    in_step = min(num_batches, max(1, round(_GROUPS_IN_STEP * code.num_data / batch_size)))
    batches = jax.tree.map(jnp.asarray, batches)

    def loss(values, start, rows, key):
        code = moved.build(values["code"], start, jnp)
        prior = guess.build(values["prior"], (), jnp)
        masks, counts = draw_sets(num_sets, code.num_workers, stragglers, has_prior, key)
        chosen = jax.tree.map(lambda leaf: leaf[rows], batches)
        losses = jax.vmap(lambda batch: objective.trained(code, prior, params, *batch, masks))(chosen)
        # The logarithm makes steps of easy and of hard batches equally long.
        return jnp.log(jnp.mean(losses, where=counts[None]) + jnp.finfo(losses.dtype).tiny)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(values, state, start, rows, key):
        value, gradients = jax.value_and_grad(loss)(values, start, rows, key)
        updates, state = optimizer.update(jax.tree.map(jnp.nan_to_num, gradients), state, values)
        return optax.apply_updates(values, updates), state, value

    def initial():
        values = jax.tree.map(jnp.array, {"code": to_device(moved.values), "prior": guess.values})
        return values, optimizer.init(values)

    optimizer = _make_optimizer(batches[1], steps)
    key = jax.random.fold_in(jax.random.key(seed), 2)
    rng = np.random.default_rng(seed)
    starts = [to_device(start) for start in moved.starts]
    best = 0
    if len(starts) > 1:
        rows = jnp.arange(in_step)
        best = int(np.nanargmin([float(step(*initial(), start, rows, key)[2]) for start in starts]))
    values, state = initial()
    for i in trange(steps, desc="refining", unit="step", disable=not progress, mininterval=1.0):
        rows = rng.choice(num_batches, in_step, replace=False)
        values, state, _ = step(values, state, starts[best], jnp.asarray(rows), jax.random.fold_in(key, i))
    code = moved.build(to_host(values["code"]), moved.starts[best], np)
    return code, guess.build(jax.device_get(values["prior"]), (), np)


def _make_optimizer(targets, steps):
    num_outputs = sum(int(np.prod(leaf.shape[2:])) for leaf in jax.tree.leaves(targets))
    return optax.multi_transform(
        {
            "code": optax.adam(optax.cosine_decay_schedule(_CODE_RATE, steps)),
            "prior": make_optimizer(optax.cosine_decay_schedule(_PRIOR_RATE, steps), num_outputs),
        },
        lambda values: {name: jax.tree.map(lambda _, name=name: name, value) for name, value in values.items()},
    )


def _calibrate(prior: Surrogate, x: PyTree[np.ndarray], targets: PyTree[np.ndarray]) -> Surrogate:
    """Calibrates the risk of a prior's guesses on inputs that it was not trained on, if there are enough."""
    x, targets = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (x, targets))
    answers = np.asarray(flatten_inputs(targets))
    if len(answers) < _LEAST_TO_CALIBRATE:
        return prior
    guesses, scores = BatchedModel(call, prior.predictor, _MODEL_BATCH)(x)
    squares = np.mean((guesses - answers) ** 2, axis=1)
    return dataclasses.replace(
        prior,
        class_risk=None if prior.class_risk is None else calibrate_disagreement(guesses, answers),
        value_risk=calibrate_squared_error(scores, squares),
    )
