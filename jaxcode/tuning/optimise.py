"""Moving worker nodes by gradient, to where the decoder errs least."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from tqdm import trange

from .._maps import apply_to_groups
from ..checks import batch_size, check_count
from ..codes import SplineCode
from ..functions import as_pure_function
from ..splines.wiener import unit_variances
from ..stragglers import AbstractStragglers

_MASKS_TO_COMPARE = 256


def optimise_nodes(
    code: SplineCode,
    stragglers: AbstractStragglers,
    *,
    f: Callable | nnx.Module | tuple[linen.Module, Mapping[str, Any]] | None = None,
    x_sample: PyTree[Array | np.ndarray] | None = None,
    steps: int = 100,
    num_masks: int = 32,
    key: PRNGKeyArray | None = None,
    progress: bool = True,
) -> SplineCode:
    r"""Moves beta by gradient, to lower the error that is expected under a straggler model.

    Without a model the expected posterior variance is lowered, that of an integrated Wiener process of scale 1 at
    alpha given the answers that came,

    .. math::
        v_k = d^T K d - 2 d^T c + \mu |d|^2,

    with d the decoder's row for :math:`\alpha_k`, K and c the values of :math:`\kappa(s, t) = |s - t|^3 / 12` between
    worker nodes, and between them and :math:`\alpha_k`. With a model and inputs, the mean squared error of the
    decoded answers, through the model's own derivative. Nodes move as angles :math:`\arcsin \beta`, by Adam, under new
    straggler sets at every step.

    Args:
        code: Where to start; alpha and the smoothings stay.
        stragglers: Who is late.
        f: A model as `jaxcode.coded` takes it, differentiable; none for the posterior variance.
        x_sample: Inputs, leaves (B, ...), B at least K, in the order in which they are to be coded. Needed with f.
        steps: How many steps.
        num_masks: Straggler sets drawn at every step.
        key: Random key of the straggler sets.
        progress: Whether to show a progress bar on standard error.

    Returns:
        The code with its worker nodes moved; the code given if that errs no more, on other straggler sets.

    Raises:
        ValueError: If arguments do not fit together, or worker nodes are not on [-1, 1].

    References:
        Kanagawa et al., Gaussian processes and kernel methods, arXiv 1807.02582, section 3, for the variance.
    """
    if not isinstance(code, SplineCode):
        raise ValueError(f"code is {code!r}; expected a SplineCode, whose worker nodes can be moved")
    if np.max(np.abs(code.worker_nodes)) > 1:
        raise ValueError(f"code.worker_nodes reach {np.max(np.abs(code.worker_nodes))}; expected nodes on [-1, 1]")
    if (f is None) != (x_sample is None):
        raise ValueError("f and x_sample go together; expected both, or neither for the posterior variance")
    check_count("steps", steps, least=0)
    check_count("num_masks", num_masks)
    key = jax.random.key(0) if key is None else key
    error = _posterior_variance if f is None else _decoding_error(f, x_sample, code)

    def expected(angles, masks):
        moved = dataclasses.replace(code, worker_nodes=jnp.sort(jnp.sin(angles)))
        return jnp.mean(jax.vmap(functools.partial(error, moved))(masks))

    def draw(key, count):
        return jax.vmap(lambda k: stragglers.sample(k, code.num_workers))(jax.random.split(key, count))

    # A tenth of the mean distance between nodes.
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1 * np.pi / code.num_workers, max(steps, 1)))

    @jax.jit
    def step(angles, state, masks):
        value, gradient = jax.value_and_grad(expected)(angles, masks)
        updates, state = optimizer.update(jnp.nan_to_num(gradient), state)
        return optax.apply_updates(angles, updates), state, value

    draws, compared = jax.random.split(key)
    start = angles = jnp.asarray(np.arcsin(code.worker_nodes))
    state = optimizer.init(angles)
    for i in trange(steps, desc="moving nodes", unit="step", disable=not progress):
        angles, state, _ = step(angles, state, draw(jax.random.fold_in(draws, i), num_masks))

    def error_of(angles):
        # By the step itself, which is compiled.
        rounds = jax.random.split(compared, -(-_MASKS_TO_COMPARE // num_masks))
        return np.mean([float(step(angles, state, draw(k, num_masks))[2]) for k in rounds])

    before, after = error_of(start), error_of(angles)
    if not after < before:
        return code
    return dataclasses.replace(code, worker_nodes=np.sort(np.sin(np.asarray(angles, np.float64))))


def _posterior_variance(code: SplineCode, returned) -> Float[Array, "data"]:
    smoothing = jnp.sum(returned) * code.decoder_smoothing
    return unit_variances(code.worker_nodes, code.data_nodes, returned, smoothing)


def _decoding_error(f, x_sample, code):
    fn, params = as_pure_function(f)
    groups = batch_size("x_sample", x_sample) // code.num_data
    if not groups:
        raise ValueError(f"x_sample has fewer inputs than a group; expected at least num_data, {code.num_data}")
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf[: groups * code.num_data]), x_sample)
    targets = jax.jit(fn)(params, x)

    def error(moved, returned):
        # The same for every straggler set: under vmap the model runs once.
        answers = fn(params, apply_to_groups("x_sample", moved.encoder_map(), x, groups))
        results = apply_to_groups("f's result", moved.decoder_map(returned), answers, groups)
        squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), results, targets)
        return sum(jax.tree.leaves(squares)) / (groups * code.num_data)

    return error
