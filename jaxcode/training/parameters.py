"""Separates codes and priors into numbers that gradients may move freely, and functions that build them again."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from ..codes import AbstractCode, InterpolatingCode, KernelCode
from ..interpolants.kernel import SMOOTHNESSES, Process
from ..nodes import Nodes
from ..surrogates import Surrogate
from ..surrogates.predictors import LinearPredictor, ModulePredictor
from ..tuning.smoothing import smoothing_of, with_smoothing

# Features of which a matrix is learned; of more, which a few hundred inputs would not determine, a factor for each.
_MOST_FOR_MATRIX = 64
# Lengths at which the training of a process starts, in units of the root mean square distance of two inputs.
_LENGTHS = (0.3, 0.6, 1.0, 2.0, 4.0, 8.0)
_NUGGET = 1e-5
# Of nodes, as a share of the curve: workers nearer than this to an input's node stay at it.
_SAME_NODE = 1e-9


class Parameters(NamedTuple):
    """Holds what is trained of a code or of a prior.

    Attributes:
        values: The numbers, unconstrained; None if there are none.
        build: From values, a start, and `jax.numpy` or `numpy`, to the code or prior. With NumPy's values in float64
            the code is static.
        starts: From where training may start: constants of equal shapes, at least one.
    """

    values: PyTree[Any]
    build: Callable[[PyTree[Any], PyTree[Any], Any], Any]
    starts: Sequence[PyTree[Any]] = ((),)


def code_parameters(code: AbstractCode, features: Callable[[], Float[np.ndarray, "inputs features"]]) -> Parameters:
    """Makes the parameters of a code.

    Args:
        code: The code. Of an `InterpolatingCode`, nodes and those smoothings that are above zero are trained; workers
            at an input's node move with it. Of a `KernelCode`, the metric of the features and the process by which
            answers are decoded, which is then no longer fitted to them. Of others, nothing.
        features: Computes a kernel code's features of a sample, without its metric.
    """
    if isinstance(code, InterpolatingCode):
        return _curve_parameters(code)
    if isinstance(code, KernelCode):
        return _kernel_parameters(code, features())
    return Parameters(None, lambda values, start, xp: code)


def prior_parameters(prior: Surrogate | None) -> Parameters:
    """Makes the parameters of a prior: a network's, or the weights of a linear predictor; not those of its risk."""
    if prior is None:
        return Parameters(None, lambda values, start, xp: None)
    predictor = prior.predictor
    if isinstance(predictor, ModulePredictor) and isinstance(predictor.params, nnx.State):
        trained, rest = nnx.split_state(predictor.params, nnx.Param, ...)

        def build_network(values, start, xp):
            moved = dataclasses.replace(predictor, params=nnx.merge_state(values, rest))
            return dataclasses.replace(prior, predictor=moved)

        return Parameters(trained, build_network)
    if isinstance(predictor, LinearPredictor):
        weights, offset = np.asarray(predictor.weights), np.asarray(predictor.offset)
        # Steps are as long as the weights of each output are wide.
        unit = np.maximum(weights[:, :-1].std(axis=0), np.finfo(np.float32).tiny)

        def build_linear(values, start, xp):
            moved = (
                xp.concatenate([weights[:, :-1] + unit[None] * values["weights"], weights[:, -1:]], axis=1),
                xp.concatenate([offset[:-1] + unit * values["offset"], offset[-1:]]),
            )
            return dataclasses.replace(
                prior, predictor=dataclasses.replace(predictor, weights=moved[0], offset=moved[1])
            )

        values = {"weights": np.zeros_like(weights[:, :-1]), "offset": np.zeros_like(offset[:-1])}
        return Parameters(values, build_linear)
    return Parameters(None, lambda values, start, xp: prior)


def _curve_parameters(code):
    data, workers = np.asarray(code.nodes.data, np.float64), np.asarray(code.nodes.workers, np.float64)
    extent = max(1.0, np.abs(data).max(), np.abs(workers).max())
    angles = np.arcsin(data / extent)
    # The input at whose node a worker is; K for none.
    distances = np.abs(workers[:, None] - data[None])
    is_near = distances.min(axis=1) <= _SAME_NODE * extent
    inputs, free = distances.argmin(axis=1)[is_near], workers[~is_near]
    smoothings = {side: smoothing_of(code, side) for side in ("encoder", "decoder")}
    values = {
        "gaps": np.zeros(len(data) - 1),
        "workers": np.zeros(len(free)),
        **{side: np.log(smoothing) for side, smoothing in smoothings.items() if smoothing},
    }
    free_angles, gaps = np.arcsin(free / extent), np.diff(angles)
    spacing = np.pi / len(workers)

    def build(values, start, xp):
        # The outer nodes stay, and all between them in their order.
        moved_gaps = gaps * xp.exp(values["gaps"])
        moved = xp.cumsum(moved_gaps) * (gaps.sum() / moved_gaps.sum())
        moved_data = extent * xp.sin(angles[0] + xp.concatenate([xp.zeros_like(moved[:1]), moved]))
        moved_workers = extent * xp.sin(free_angles + spacing * values["workers"])
        nodes = Nodes(moved_data, xp.sort(xp.concatenate([moved_data[inputs], moved_workers])))
        smoothed = {side: xp.exp(values[side]) for side in ("encoder", "decoder") if side in values}
        return with_smoothing(dataclasses.replace(code, nodes=nodes), **smoothed)

    return Parameters(values, build)


def _kernel_parameters(code, features):
    count = features.shape[1]
    scale = np.float64(features.std(axis=0))
    # Features that hardly vary tell nothing.
    scale = np.maximum(scale, 1e-6 * scale.max()) if scale.max() > 0 else np.ones_like(scale)
    if code.metric is not None and code.process is not None:
        process = jax.tree.map(lambda leaf: np.float64(leaf), code.process)
        starts = [(np.float64(code.metric) / process.length, process.smoothness, process.nugget)]
    else:
        metric = 1 / (scale * np.sqrt(2 * count)) if code.metric is None else np.float64(code.metric)
        smoothnesses = np.asarray(SMOOTHNESSES[1:])
        starts = [(metric / length, smooth, np.float64(_NUGGET)) for smooth in smoothnesses for length in _LENGTHS]
    is_matrix = starts[0][0].ndim == 2 or count <= _MOST_FOR_MATRIX
    if is_matrix and starts[0][0].ndim == 1:
        starts = [(np.diag(metric), *rest) for metric, *rest in starts]
    values = {"scales": np.zeros(count), "nugget": np.zeros(())}
    if is_matrix:
        values["mixing"] = np.zeros(2 * starts[0][0].shape[1:])

    def build(values, start, xp):
        metric, smoothness, nugget = start
        if is_matrix:
            metric = xp.matmul(metric, xp.eye(metric.shape[1]) + values["mixing"])
        scales = xp.exp(values["scales"])
        metric = metric * (scales[:, None] if is_matrix else scales)
        nugget = xp.maximum(nugget, _NUGGET**2) * xp.exp(values["nugget"])
        process = Process(smoothness, xp.ones_like(nugget), nugget)
        return dataclasses.replace(code, metric=metric, process=process, length=None)

    return Parameters(values, build, starts)


def to_device(values: PyTree[Any]) -> PyTree[Array]:
    """Moves values to the device, in JAX's default precision."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(float)), values)


def to_host(values: PyTree[Any]) -> PyTree[np.ndarray]:
    """Fetches values to the host, in float64."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jax.device_get(values))
