"""How far decoded estimates are from what the uncoded model gives.

The measures of the reference, as pure functions that work under jit, vmap and grad. Arrays have shape
``(..., K, m)``: the last axis is one input's output, every axis before it counts inputs, all alike. An input
that could not be decoded is a row of NaN.

References:
    Moradi, Tahmasebi and Maddah-Ali, Coded Computing for Resilient Distributed Computing: A
    Learning-Theoretic Framework, arXiv 2406.00300.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer


def rmse(
    estimates: Float[ArrayLike, "..."],
    targets: Float[ArrayLike, "..."],
    *,
    where: Bool[ArrayLike, "..."] | None = None,
) -> Float[Array, ""]:
    r"""Root of the mean squared error norm.

    .. math:: \sqrt{\frac{1}{K} \sum_k \|\hat f(x_k) - f(x_k)\|_2^2}

    The norm sums over outputs, so this is :math:`\sqrt m` times the root mean square over single numbers.

    Args:
        estimates: decoded outputs, ``(..., K, m)``.
        targets: the model's own outputs, the same shape.
        where: which inputs count, bool ``(..., K)``; all by default. What the others hold, NaN included,
            touches neither the value nor the gradient.

    Returns:
        A scalar in the units of the outputs; float64 if an argument is, else float32. NaN if an input that
        counts is NaN, or if none counts.

    Raises:
        ValueError: if ``targets`` has another shape than ``estimates``, or ``where`` than the inputs, or if
            ``where`` is not bool.

    References:
        arXiv 2406.00300 names this in its text and prints :func:`mean_error_norm`, which is at most this.

    >>> float(rmse(jnp.array([[3.0, 4.0], [0.0, 0.0]]), jnp.zeros((2, 2)), where=jnp.array([True, False])))
    5.0
    """
    squared, where = _squared_error_norm(estimates, targets, where)
    return _sqrt(jnp.mean(squared, where=where))


def mean_error_norm(
    estimates: Float[ArrayLike, "..."],
    targets: Float[ArrayLike, "..."],
    *,
    where: Bool[ArrayLike, "..."] | None = None,
) -> Float[Array, ""]:
    r"""Mean error norm: the loss that the reference prints.

    .. math:: \frac{1}{K} \sum_k \|\hat f(x_k) - f(x_k)\|_2

    Args:
        estimates: decoded outputs, ``(..., K, m)``.
        targets: the model's own outputs, the same shape.
        where: which inputs count, as for :func:`rmse`.

    Returns:
        A scalar in the units of the outputs; float64 if an argument is, else float32. NaN if an input that
        counts is NaN, or if none counts.

    Raises:
        ValueError: as for :func:`rmse`.

    References:
        arXiv 2406.00300, which calls it the root mean square error; for that see :func:`rmse`.

    >>> float(mean_error_norm(jnp.array([[3.0, 4.0], [0.0, 0.0]]), jnp.zeros((2, 2))))
    2.5
    """
    squared, where = _squared_error_norm(estimates, targets, where)
    return jnp.mean(_sqrt(squared), where=where)


def accuracy(logits: Float[ArrayLike, "..."], labels: Integer[ArrayLike, "..."]) -> Float[Array, ""]:
    """Share of inputs whose largest output is at the label.

    Args:
        logits: logits or probabilities, ``(..., K, m)``; the first of equal largest counts.
        labels: class indices, integers, ``(..., K)``.

    Returns:
        A scalar in [0, 1], default floating dtype. A row that holds a NaN counts as wrong.

    Raises:
        ValueError: if ``labels`` are not integers of the inputs' shape.

    >>> float(accuracy(jnp.array([[0.1, 0.9], [jnp.nan, jnp.nan]]), jnp.array([1, 0])))
    0.5
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    _check_rows("labels", labels, "logits", logits)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integer class indices, got dtype {labels.dtype}; cast them to int32")
    predicted = jnp.argmax(logits, axis=-1)
    return jnp.mean((predicted == labels.astype(predicted.dtype)) & _decoded(logits))


def relative_accuracy(
    estimates: Float[ArrayLike, "..."], targets: Float[ArrayLike, "..."], labels: Integer[ArrayLike, "..."]
) -> Float[Array, ""]:
    r"""Accuracy of the decoded estimates over that of the base model (RelAcc).

    .. math:: \mathrm{RelAcc} = \mathrm{accuracy}(\hat f) / \mathrm{accuracy}(f)

    Args:
        estimates: decoded logits or probabilities, ``(..., K, m)``.
        targets: the base model's own, the same shape.
        labels: class indices, integers, ``(..., K)``.

    Returns:
        A scalar, default floating dtype: 1 where coding costs nothing, above 1 where it happens to help. Rows
        that hold a NaN count as wrong. Not finite if the base model is always wrong.

    Raises:
        ValueError: if ``targets`` has another shape than ``estimates``, or ``labels`` are not integers of the
            inputs' shape.

    References:
        arXiv 2406.00300.

    >>> base = jnp.eye(4)
    >>> float(relative_accuracy(base.at[0].set(jnp.nan), base, jnp.arange(4)))
    0.75
    """
    estimates, targets = jnp.asarray(estimates), jnp.asarray(targets)
    _check_same_shape(estimates, targets)
    return accuracy(estimates, labels) / accuracy(targets, labels)


def agreement(estimates: Float[ArrayLike, "..."], targets: Float[ArrayLike, "..."]) -> Float[Array, ""]:
    """Share of inputs for which the estimate predicts the class that the base model predicts.

    Needs no labels, and unlike :func:`relative_accuracy` does not let lucky errors cancel unlucky ones.

    Args:
        estimates: decoded logits or probabilities, ``(..., K, m)``.
        targets: the base model's own, the same shape.

    Returns:
        A scalar in [0, 1], default floating dtype. A row that holds a NaN, in either, does not agree.

    Raises:
        ValueError: if ``targets`` has another shape than ``estimates``.

    >>> base = jnp.eye(4)
    >>> float(agreement(base.at[0].set(jnp.nan), base))
    0.75
    """
    estimates, targets = jnp.asarray(estimates), jnp.asarray(targets)
    _check_same_shape(estimates, targets)
    same = jnp.argmax(estimates, axis=-1) == jnp.argmax(targets, axis=-1)
    return jnp.mean(same & _decoded(estimates) & _decoded(targets))


def _squared_error_norm(estimates, targets, where):
    """Squared error norms ``(..., K)``, 0 for inputs that do not count, and the mask of those that do."""
    estimates, targets = jnp.asarray(estimates), jnp.asarray(targets)
    _check_same_shape(estimates, targets)
    where = jnp.ones(estimates.shape[:-1], bool) if where is None else jnp.asarray(where)
    _check_rows("where", where, "estimates", estimates)
    if where.dtype != bool:
        raise ValueError(f"where must be bool, got dtype {where.dtype}; cast it with .astype(bool)")
    dtype = jnp.float64 if jnp.float64 in (estimates.dtype, targets.dtype) else jnp.float32
    error = estimates.astype(dtype) - targets.astype(dtype)
    # Before squaring: a masked NaN must not reach the gradient of the square.
    return jnp.sum(jnp.where(where[..., None], error, 0) ** 2, axis=-1), where


def _sqrt(x):
    """A square root whose gradient at 0 is 0, where an exact estimate would make it NaN."""
    zero = x == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def _decoded(outputs):
    # argmax points at a NaN, which would make a lost input a prediction.
    return ~jnp.isnan(outputs).any(axis=-1)


def _check_same_shape(estimates, targets):
    if estimates.shape != targets.shape or estimates.ndim == 0:
        raise ValueError(
            "targets must have the shape (..., K, m) of estimates, got "
            f"{targets.shape} and {estimates.shape}; pass one row of outputs per input in both"
        )


def _check_rows(name, rows, outputs_name, outputs):
    if outputs.ndim == 0 or rows.shape != outputs.shape[:-1]:
        raise ValueError(
            f"{name} must have the shape of {outputs_name} without its last axis, got {rows.shape} for "
            f"{outputs.shape}; pass one entry per input"
        )
