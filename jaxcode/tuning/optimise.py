"""Moves worker nodes by gradient to where decoding errs least."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from tqdm import trange

from ..checks import batch_size, check_count
from ..codes import AbstractCode, InterpolatingCode
from ..functions import Model, as_pure_function
from ..interpolants.spline.wiener import unit_variances
from ..outputs import as_returned
from ..pipeline import decode, encode, flatten_groups, group, unflatten_groups
from ..stragglers import AbstractStragglers
from .losses import squared_error
from .smoothing import smoothing_of

__all__ = ["optimise_nodes"]

# Straggler sets on which the nodes before and after are compared: more tell smaller gains from chance.
_NUM_COMPARISON_MASKS = 256


def optimise_nodes(
    code: InterpolatingCode,
    stragglers: AbstractStragglers,
    *,
    f: Model | None = None,
    x_sample: PyTree[Array | np.ndarray] | None = None,
    steps: int = 100,
    num_masks: int = 32,
    key: PRNGKeyArray | None = None,
    progress: bool = True,
) -> InterpolatingCode:
    r"""Moves the worker nodes beta by gradient, to lower the error that is expected under a straggler model.

    Without a model the expected posterior variance is lowered, that of an integrated Wiener process of scale 1 at
    alpha given the answers that returned,

    .. math::
        v_k = d^T K d - 2 d^T c + \mu |d|^2,

    with d the decoder's row for :math:`\alpha_k`, K and c the values of :math:`\kappa(s, t) = |s - t|^3 / 12` between
    worker nodes, and between them and :math:`\alpha_k`, and :math:`\mu` the decoder's smoothing times the number of
    answers. With a model and inputs, the mean squared error of the decoded answers, through the model's own derivative.
    Nodes move as angles :math:`\arcsin \beta`, by Adam, under new straggler sets at every step. Straggler sets that
    leave fewer than two answers, which determine no curve, do not count.

    Args:
        code: The code to start from; its alpha and interpolants stay. Without f, its decoder is a `Spline`.
        stragglers: Which workers are late.
        f: A model as `jaxcode.coded` takes it, differentiable; none for the posterior variance.
        x_sample: Inputs, leaves (B, ...), B at least num_data, in the order in which they are coded. Needed with f.
        steps: How many steps.
        num_masks: Straggler sets drawn at every step.
        key: Random key of the straggler sets.
        progress: Whether to show a progress bar on standard error.

    Returns:
        The code with its worker nodes moved, or the given code if its error on other straggler sets is no larger.

    Raises:
        ValueError: If only one of f and x_sample is given, x_sample is shorter than a group, steps or num_masks is not
            a whole number or is too small, the code has no nodes, its decoder has no smoothing and f is not given, or
            worker nodes are not on [-1, 1].

    References:
        Kanagawa et al., Gaussian processes and kernel methods, arXiv 1807.02582, section 3, for the variance.

    >>> from jaxcode import SplineCode, stragglers
    >>> code = SplineCode.chebyshev(num_data=4, num_workers=6)
    >>> moved = optimise_nodes(code, stragglers.Uniform(1), steps=2, progress=False)
    >>> moved.num_workers
    6
    """
    _check_code(code, needs_smoothing=f is None)
    if (f is None) != (x_sample is None):
        raise ValueError("f and x_sample go together; expected both, or neither for the posterior variance")
    check_count("steps", steps, least=0)
    check_count("num_masks", num_masks)
    key = jax.random.key(0) if key is None else key
    error = _posterior_variance if f is None else _decoding_error(f, x_sample, code)

    def expected_error(angles, masks, counts):
        candidate = _with_workers(code, jnp.sort(jnp.sin(angles)))
        errors = jax.vmap(functools.partial(error, candidate))(masks)
        return jnp.mean(jnp.where(counts, jnp.mean(errors.reshape(len(masks), -1), axis=1), 0))

    def draw(key, count):
        masks = jax.vmap(lambda key: stragglers.sample(key, code.num_workers))(jax.random.split(key, count))
        # Fewer than two answers determine no curve, wherever the nodes are: for such a mask the error is undefined, and
        # counts as zero. It is computed with all answers, so that no NaN reaches the derivatives.
        counts = jnp.sum(masks, axis=1) >= 2
        return masks | ~counts[:, None], counts

    # A tenth of the mean distance between nodes.
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1 * np.pi / code.num_workers, max(steps, 1)))

    @jax.jit
    def step(angles, state, masks, counts):
        value, gradient = jax.value_and_grad(expected_error)(angles, masks, counts)
        # Optax divides step counts by floats, which strict promotion would refuse.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jnp.nan_to_num(gradient), state)
        return optax.apply_updates(angles, updates), state, value

    draw_key, comparison_key = jax.random.split(key)
    start = angles = jnp.asarray(np.arcsin(code.nodes.workers))
    state = optimizer.init(angles)
    for i in trange(steps, desc="moving nodes", unit="step", disable=not progress):
        angles, state, _ = step(angles, state, *draw(jax.random.fold_in(draw_key, i), num_masks))

    def error_at(angles):
        # The step, which is already compiled, returns the error too.
        keys = jax.random.split(comparison_key, -(-_NUM_COMPARISON_MASKS // num_masks))
        return np.mean([float(step(angles, state, *draw(key, num_masks))[2]) for key in keys])

    start_error, end_error = error_at(start), error_at(angles)
    if not end_error < start_error:
        return code
    return _with_workers(code, np.sort(np.sin(np.asarray(angles, np.float64))))


def _check_code(code: AbstractCode, needs_smoothing: bool) -> None:
    if not (dataclasses.is_dataclass(code) and getattr(code, "nodes", None) is not None):
        raise ValueError(
            f"code is {code!r}; expected one with nodes that can be moved, such as SplineCode.chebyshev(20, 30)"
        )
    if needs_smoothing and smoothing_of(code, "decoder") is None:
        raise ValueError(
            f"code.decoder is {getattr(code, 'decoder', None)!r}, which has no posterior variance; expected "
            "jaxcode.interpolants.Spline, or f and x_sample, to lower the error of the decoded answers instead"
        )
    largest = np.max(np.abs(code.nodes.workers))  # pyright: ignore[reportOptionalMemberAccess]
    if largest > 1:
        raise ValueError(f"code.nodes.workers reach {largest}; expected nodes on [-1, 1]")


def _with_workers(code: InterpolatingCode, workers: Float[Array | np.ndarray, "workers"]) -> InterpolatingCode:
    return dataclasses.replace(code, nodes=dataclasses.replace(code.nodes, workers=workers))


def _posterior_variance(code: InterpolatingCode, returned) -> Float[Array, "data"]:
    # The decoder's smoothing is relative to a mean of squares, the variance's to their sum.
    count = jnp.sum(returned, dtype=jnp.result_type(float))
    smoothing = count * jnp.asarray(code.decoder.smoothing, count.dtype)  # pyright: ignore[reportAttributeAccessIssue]
    return unit_variances(code.nodes.workers, code.nodes.data, returned, smoothing)


def _decoding_error(f, x_sample, code):
    """Makes the function of a code and a mask that computes the mean squared error of the decoded answers."""
    fn, params = as_pure_function(f)
    num_groups = batch_size("x_sample", x_sample) // code.num_data
    if not num_groups:
        raise ValueError(f"x_sample has fewer inputs than a group; expected at least num_data, {code.num_data}")
    sample = jax.tree.map(lambda leaf: jnp.asarray(leaf[: num_groups * code.num_data]), x_sample)
    x, _ = group(sample, code.num_data, None)
    targets = jax.jit(fn)(params, flatten_groups(x))

    def error(candidate, returned):
        # The same for every straggler set: under vmap the model runs once.
        answers = fn(params, flatten_groups(encode(candidate, None, x)))
        results = decode(candidate, None, unflatten_groups(answers, code.num_workers), as_returned, returned)
        return squared_error(flatten_groups(results), targets)

    return error
