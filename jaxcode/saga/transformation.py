"""Defines SAGA as a gradient transformation of optax."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Integer, PyTree

from ..checks import check_count, static_value
from ._rounds import transfer
from ._samples import check_params
from ._tables import append_axes, compensated_add, first_occurrences, two_sum


class ScaleBySagaState(NamedTuple):
    """Holds the state of SAGA.

    Attributes:
        table: The last gradient of each sample, leaves (n, ...).
        total: The sum of the table, in float32 at least.
        compensation: What rounding has left out of the total.
    """

    table: PyTree[Array]
    total: PyTree[Array]
    compensation: PyTree[Array]


def scale_by_saga(
    num_samples: int, *, table_dtype: jax.typing.DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces a sample's gradient by SAGA's estimate of the mean gradient, whose variance vanishes at the optimum.

    .. math::
        v = g_j - a_j + \frac{1}{n} \sum_{i=1}^n a_i, \qquad a_j \leftarrow g_j

    The table a starts from zeros; whatever it holds, the estimate is unbiased where j is drawn uniformly. It needs as
    much memory as n times the parameters: for linear models `DistributedSaga` needs one number for each sample. A
    sample may also be a minibatch, one of n fixed ones, drawn as a whole.

    The sum is stored with what rounding leaves out of it: gradients of single samples are added and subtracted without
    any loss, however often, and those of a minibatch with the loss of adding them up.

    Args:
        num_samples: n.
        table_dtype: The dtype of the table, such as bfloat16; that of the parameters if not given. A narrow one rounds
            the table, not the estimate's mean.

    Returns:
        A transformation whose `update` takes `index`: j, an integer, for the gradient of one sample; or integers (b,)
        for gradients of b samples, leaves (b, ...), of which the estimate is the mean. A sample that is contained twice
        counts twice. Where index is traced, numbers outside of 0, ..., n - 1 are not noticed.

    Raises:
        ValueError: If num_samples is no whole number of at least 1, or table_dtype is no dtype of real numbers; from
            `init`, if parameters are empty or no real numbers; or, from `update`, if index has other numbers than 0 to
            n - 1, or updates are no tree like the parameters or, for b samples, have no leading axis b.

    References:
        Defazio, Bach and Lacoste-Julien, SAGA: A Fast Incremental Gradient Method With Support for Non-Strongly Convex
        Composite Objectives, arXiv 1407.0202.

    >>> transformation = scale_by_saga(num_samples=2)
    >>> state = transformation.init(jnp.zeros(3))
    >>> estimate, state = transformation.update(jnp.ones(3), state, index=0)
    >>> estimate, state = transformation.update(3 * jnp.ones(3), state, index=1)
    >>> estimate
    Array([3.5, 3.5, 3.5], dtype=float32)
    """
    num_samples = check_count("num_samples", num_samples)
    if table_dtype is not None and not jnp.issubdtype(table_dtype, jnp.floating):
        raise ValueError(f"table_dtype is {table_dtype!r}; expected one of real numbers, such as jnp.bfloat16")

    def init(params):
        return _begin(check_params(params), num_samples, None if table_dtype is None else jnp.dtype(table_dtype))

    def update(updates, state, params=None, *, index: Integer[Array | np.ndarray | int, "..."], **_):
        del params
        updates, index = transfer((updates, index if isinstance(index, jax.Array) else np.asarray(index)))
        _check_update(index, updates, state.table)
        return _update(updates, state, index)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def saga(
    learning_rate: optax.ScalarOrSchedule, num_samples: int, *, table_dtype: jax.typing.DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Steps against SAGA's estimate of the mean gradient: the SAGA optimizer.

    .. math:: w \leftarrow w - \gamma v

    If every sample's loss is convex with an L-Lipschitz gradient, steps of 1/(3 L) converge, and do so linearly if the
    mean is strongly convex.

    Args:
        learning_rate: The length of a step, a number or a schedule of the number of steps so far.
        num_samples: n.
        table_dtype: As for `scale_by_saga`.

    Returns:
        A transformation whose `update` takes `index`, as that of `scale_by_saga`.

    References:
        As for `scale_by_saga`.

    >>> optimizer = saga(0.1, num_samples=2)
    >>> params = jnp.array([1.0, 1.0])
    >>> state = optimizer.init(params)
    >>> grad = jax.grad(lambda w, x: (w @ x) ** 2)(params, jnp.array([1.0, 0.0]))
    >>> updates, state = optimizer.update(grad, state, params, index=0)
    >>> optax.apply_updates(params, updates)
    Array([0.8, 1. ], dtype=float32)
    """
    return optax.chain(scale_by_saga(num_samples, table_dtype=table_dtype), optax.scale_by_learning_rate(learning_rate))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _begin(params, num_samples, table_dtype):
    """Returns the state before the first update."""

    def sums():
        # In float32 at least; strict promotion has no rule for that.
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, max(leaf.dtype, jnp.float32, key=_bits)), params)

    table = jax.tree.map(lambda leaf: jnp.zeros((num_samples, *leaf.shape), table_dtype or leaf.dtype), params)
    # Two arrays of zeros, because a state that is donated must not contain one twice.
    return ScaleBySagaState(table, sums(), sums())


def _bits(dtype):
    return jnp.finfo(dtype).bits


@jax.jit
def _update(updates, state, index):
    """Returns the estimate and the next state."""
    if index.ndim == 0:
        index, updates = index[None], jax.tree.map(lambda leaf: leaf[None], updates)
    num_samples = jax.tree.leaves(state.table)[0].shape[0]
    first = first_occurrences(index)
    old = jax.tree.map(lambda table: table[index], state.table)
    new = jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), updates, old)
    estimate = jax.tree.map(
        lambda g, old, total, compensation: (
            jnp.mean(g - old.astype(g.dtype), axis=0) + ((total + compensation) / num_samples).astype(g.dtype)
        ),
        updates,
        old,
        state.total,
        state.compensation,
    )

    def first_entries(leaf, total):
        return jnp.where(append_axes(first, leaf), leaf.astype(total.dtype), 0)

    new_entries, old_entries = (jax.tree.map(first_entries, leaves, state.total) for leaves in (new, old))
    change, error = two_sum(new_entries, jax.tree.map(jnp.negative, old_entries))
    change, error = (jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), leaves) for leaves in (change, error))
    compensation = jax.tree.map(jnp.add, state.compensation, error)
    total, compensation = compensated_add(state.total, compensation, change)
    table = jax.tree.map(lambda table, new: table.at[index].set(new), state.table, new)
    return estimate, ScaleBySagaState(table, total, compensation)


def _check_update(index, updates, table):
    if index.ndim > 1 or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(
            f"index has shape {index.shape} and dtype {index.dtype}; expected the number of one sample, or the numbers "
            "of a minibatch's samples"
        )
    if jax.tree.structure(updates) != jax.tree.structure(table):
        raise ValueError(
            f"updates are a tree {jax.tree.structure(updates)}; expected {jax.tree.structure(table)}, as the parameters"
        )
    count = jax.tree.leaves(table)[0].shape[0]
    values = static_value(index)
    if not index.size or (values is not None and (values.min() < 0 or values.max() >= count)):
        raise ValueError(f"index is {index}; expected at least one number, from 0 to {count - 1}")
    for (path, leaf), entries in zip(jax.tree.leaves_with_path(updates), jax.tree.leaves(table), strict=True):
        expected = (*index.shape, *entries.shape[1:])
        if leaf.shape != expected:
            raise ValueError(
                f"updates{jax.tree_util.keystr(path)} has shape {leaf.shape}; expected {expected}"
                + (", a gradient for each sample, as jax.vmap(jax.grad(loss), (None, 0)) gives" if index.ndim else "")
            )
