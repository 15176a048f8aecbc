r"""Measures how far decoded results are from the outputs of the uncoded model.

Pure functions that work under jit, vmap and grad. Arrays have shape (..., K, m): the last axis is the output for one
input, all axes before it count inputs. An input that could not be decoded is a row of NaN.

References:
    Moradi, Tahmasebi and Maddah-Ali, Coded Computing for Resilient Distributed Computing: A Learning-Theoretic
    Framework, arXiv 2406.00300.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer, Real

from ._arrays import as_arrays
from ._math import safe_sqrt
from .checks import is_real

__all__ = ["accuracy", "agreement", "mean_error_norm", "relative_accuracy", "rmse"]


def rmse(
    estimates: Float[ArrayLike, "..."],
    targets: Float[ArrayLike, "..."],
    *,
    where: Bool[ArrayLike, "..."] | None = None,
) -> Float[Array, ""]:
    r"""Computes the root of the mean squared error norm.

    .. math:: \sqrt{\frac{1}{K} \sum_k \|\hat f(x_k) - f(x_k)\|_2^2}

    The norm sums over outputs, so this is :math:`\sqrt m` times the root mean square over single numbers.

    Args:
        estimates: Decoded outputs, shape (..., K, m).
        targets: The model's outputs, the same shape.
        where: Which inputs count, bool, shape (..., K); all by default. The values of the others, NaN included, change
            neither the result nor the gradient.

    Returns:
        A scalar in the units of the outputs; float64 if an argument is, else float32. NaN if an input that counts is
            NaN, or if none counts.

    Raises:
        ValueError: If estimates or targets are not real, their shapes differ, or where is not bool with one entry for
            each input.

    References:
        arXiv 2406.00300 names this in its text and prints `mean_error_norm`, which is at most this.

    >>> float(rmse(jnp.array([[3.0, 4.0], [0.0, 0.0]]), jnp.zeros((2, 2)), where=jnp.array([True, False])))
    5.0
    """
    return _rmse(*_as_error_arguments(estimates, targets, where))


def mean_error_norm(
    estimates: Float[ArrayLike, "..."],
    targets: Float[ArrayLike, "..."],
    *,
    where: Bool[ArrayLike, "..."] | None = None,
) -> Float[Array, ""]:
    r"""Computes the mean error norm, the loss that the reference prints.

    .. math:: \frac{1}{K} \sum_k \|\hat f(x_k) - f(x_k)\|_2

    Args:
        estimates: Decoded outputs, shape (..., K, m).
        targets: The model's outputs, the same shape.
        where: Which inputs count, as in `rmse`.

    Returns:
        A scalar in the units of the outputs; float64 if an argument is, else float32. NaN if an input that counts is
            NaN, or if none counts.

    Raises:
        ValueError: As in `rmse`.

    References:
        arXiv 2406.00300, which calls it the root mean square error; for that see `rmse`.

    >>> float(mean_error_norm(jnp.array([[3.0, 4.0], [0.0, 0.0]]), jnp.zeros((2, 2))))
    2.5
    """
    return _mean_error_norm(*_as_error_arguments(estimates, targets, where))


def accuracy(logits: Float[ArrayLike, "..."], labels: Integer[ArrayLike, "..."]) -> Float[Array, ""]:
    """Computes the share of inputs whose largest output is at the label.

    Args:
        logits: Logits or probabilities, shape (..., K, m); the first of equal largest counts.
        labels: Class indices, integers, shape (..., K).

    Returns:
        A scalar in [0, 1], default floating dtype. A row that holds a NaN counts as wrong.

    Raises:
        ValueError: If logits are not real, or labels are not integers, one for each input.

    >>> float(accuracy(jnp.array([[0.1, 0.9], [jnp.nan, jnp.nan]]), jnp.array([1, 0])))
    0.5
    """
    logits, labels = _as_outputs("logits", logits), as_arrays("labels", labels)
    _check_labels(labels, "logits", logits)
    return _accuracy(logits, labels)


def relative_accuracy(
    estimates: Float[ArrayLike, "..."], targets: Float[ArrayLike, "..."], labels: Integer[ArrayLike, "..."]
) -> Float[Array, ""]:
    r"""Computes the accuracy of the decoded estimates over that of the base model (RelAcc).

    .. math:: \mathrm{RelAcc} = \mathrm{accuracy}(\hat f) / \mathrm{accuracy}(f)

    Args:
        estimates: Decoded logits or probabilities, shape (..., K, m).
        targets: Those of the base model, the same shape.
        labels: Class indices, integers, shape (..., K).

    Returns:
        A scalar, default floating dtype: 1 where coding costs nothing, above 1 where it happens to help. Rows that hold
            a NaN count as wrong. Not finite if the base model is always wrong.

    Raises:
        ValueError: If estimates or targets are not real, their shapes differ, or labels are not integers, one for each
            input.

    References:
        arXiv 2406.00300.

    >>> base = jnp.eye(4)
    >>> float(relative_accuracy(base.at[0].set(jnp.nan), base, jnp.arange(4)))
    0.75
    """
    estimates, targets = _as_output_pair(estimates, targets)
    labels = as_arrays("labels", labels)
    _check_labels(labels, "estimates", estimates)
    return _accuracy(estimates, labels) / _accuracy(targets, labels)


def agreement(estimates: Real[ArrayLike, "..."], targets: Real[ArrayLike, "..."]) -> Float[Array, ""]:
    """Computes the share of inputs for which the estimate predicts the class that the base model predicts.

    Needs no labels, and unlike `relative_accuracy` does not let lucky errors cancel unlucky ones.

    Args:
        estimates: Decoded logits or probabilities, shape (..., K, m).
        targets: Those of the base model, the same shape.

    Returns:
        A scalar in [0, 1], default floating dtype. A row that holds a NaN, in either, does not agree.

    Raises:
        ValueError: If estimates or targets are not real, or their shapes differ.

    >>> base = jnp.eye(4)
    >>> float(agreement(base.at[0].set(jnp.nan), base))
    0.75
    """
    return _agreement(*_as_output_pair(estimates, targets))


# Each is compiled as one function. Evaluated eagerly, its constants would be implicit transfers, and a NaN in a masked
# row would be an error under `jax.debug_nans`.


@jax.jit
def _rmse(estimates, targets, where):
    return safe_sqrt(jnp.mean(_squared_error_norm(estimates, targets, where), where=where))


@jax.jit
def _mean_error_norm(estimates, targets, where):
    return jnp.mean(safe_sqrt(_squared_error_norm(estimates, targets, where)), where=where)


@jax.jit
def _accuracy(logits, labels):
    predicted = jnp.argmax(logits, axis=-1)
    return jnp.mean((predicted == labels.astype(predicted.dtype)) & _is_decoded(logits))


@jax.jit
def _agreement(estimates, targets):
    is_same_class = jnp.argmax(estimates, axis=-1) == jnp.argmax(targets, axis=-1)
    return jnp.mean(is_same_class & _is_decoded(estimates) & _is_decoded(targets))


def _squared_error_norm(estimates, targets, where):
    """Computes squared error norms, shape (..., K), 0 for inputs that do not count."""
    dtype = jnp.float64 if jnp.float64 in (estimates.dtype, targets.dtype) else jnp.float32
    error = estimates.astype(dtype) - targets.astype(dtype)
    if where is not None:
        # Before squaring: a masked NaN must not reach the gradient of the square.
        error = jnp.where(where[..., None], error, 0)
    return jnp.sum(error**2, axis=-1)


def _is_decoded(outputs):
    # argmax returns the index of a NaN: without this check a lost input could count as a correct prediction.
    return ~jnp.isnan(outputs).any(axis=-1)


def _as_error_arguments(estimates, targets, where):
    """Converts estimates, targets and the mask of the inputs that count to arrays of shapes and dtypes that fit."""
    estimates, targets = _as_output_pair(estimates, targets)
    if where is None:
        return estimates, targets, None
    where = as_arrays("where", where)
    _check_rows("where", where, "estimates", estimates)
    if where.dtype != np.bool_:
        raise ValueError(f"where has dtype {where.dtype}; expected bool: convert it with .astype(bool)")
    return estimates, targets, where


def _as_output_pair(estimates, targets):
    """Converts estimates and targets to arrays of one shape."""
    estimates, targets = _as_outputs("estimates", estimates), _as_outputs("targets", targets)
    if estimates.shape != targets.shape:
        raise ValueError(
            f"targets has shape {targets.shape}; expected that of estimates, {estimates.shape}: give one row of "
            "outputs for each input in both"
        )
    return estimates, targets


def _as_outputs(name, outputs):
    """Converts outputs to an array of real numbers, shape (..., K, m)."""
    outputs = as_arrays(name, outputs)
    if not isinstance(outputs, jax.Array):
        raise ValueError(f"{name} is {outputs!r}; expected one array: measure each leaf of a tree by itself")
    if outputs.ndim == 0:
        raise ValueError(f"{name} has shape (); expected (..., K, m): give one row of outputs for each input")
    if not is_real(outputs.dtype):
        raise ValueError(f"{name} has dtype {outputs.dtype}; expected real numbers: give logits or probabilities")
    return outputs


def _check_labels(labels, name, outputs):
    _check_rows("labels", labels, name, outputs)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels has dtype {labels.dtype}; expected integer class indices: convert them to int32")


def _check_rows(name, rows, outputs_name, outputs):
    """Checks that there is one entry for each input."""
    if rows.shape != outputs.shape[:-1]:
        raise ValueError(
            f"{name} has shape {rows.shape}; expected {outputs.shape[:-1]}, that of {outputs_name} without its last "
            "axis: give one entry for each input"
        )
