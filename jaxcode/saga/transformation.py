"""SAGA as a gradient transformation of optax."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Integer, PyTree

from ..checks import check_count, is_concrete
from ._tables import add, along, exact_sum, first_of_each


class ScaleBySagaState(NamedTuple):
    """What SAGA remembers.

    Attributes:
        table: The last gradient of each sample, leaves (n, ...).
        total: The sum of the table, in float32 at least.
        rest: What rounding has left out of the total.
    """

    table: PyTree[Array]
    total: PyTree[Array]
    rest: PyTree[Array]


def scale_by_saga(
    num_samples: int, *, table_dtype: jax.typing.DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces a sample's gradient by SAGA's estimate of the mean gradient, whose variance vanishes at the optimum.

    .. math::
        v = g_j - a_j + \frac{1}{n} \sum_{i=1}^n a_i, \qquad a_j \leftarrow g_j

    The table a begins with zeros; whatever it holds, the estimate is unbiased where j is drawn uniformly. It needs as
    much memory as n times the parameters: for linear models `DistributedSaga` needs one number a sample. A sample may
    also be a minibatch, of n fixed ones, drawn as a whole.

    The sum is kept with what rounding leaves out of it: single samples' gradients are added and taken off without any
    loss, however often, and those of a minibatch with that of adding them up.

    Args:
        num_samples: n.
        table_dtype: Of the table, such as bfloat16; the gradients' own if not given. What is rounded is the memory,
            not the estimate's mean.

    Returns:
        A transformation whose `update` takes `index`: j, an integer, for the gradient of one sample; or integers (b,)
        for gradients of b samples, leaves (b, ...), of which the estimate is the mean. A sample that is there twice
        counts twice. Where `update` is traced, numbers outside of 0, ..., n - 1 are not noticed.

    Raises:
        ValueError: If num_samples is no whole number of at least 1 or table_dtype none of real numbers, or, from
            `update`, if index is no integers from 0 to n - 1, or updates are no tree like the parameters or, of b
            samples, have no leading axis b.

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
        def table(leaf):
            return jnp.zeros((num_samples, *leaf.shape), table_dtype or leaf.dtype)

        def zeros(leaf):
            return jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))

        # Two arrays of zeros, for a state that is donated must not hold one twice.
        total, rest = jax.tree.map(zeros, params), jax.tree.map(zeros, params)
        return ScaleBySagaState(jax.tree.map(table, params), total, rest)

    def update(updates, state, params=None, *, index: Integer[Array | np.ndarray | int, "..."], **_):
        del params
        updates = jax.tree.map(jnp.asarray, updates)
        index = _checked(index, updates, state.table)
        if index.ndim == 0:
            index, updates = index[None], jax.tree.map(lambda leaf: leaf[None], updates)
        first = first_of_each(index)
        held = jax.tree.map(lambda table: table[index], state.table)
        kept = jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), updates, held)
        estimate = jax.tree.map(
            lambda g, old, total, rest: (
                jnp.mean(g - old.astype(g.dtype), axis=0) + ((total + rest) / num_samples).astype(g.dtype)
            ),
            updates,
            held,
            state.total,
            state.rest,
        )

        def once(leaf, total):
            return jnp.where(along(first, leaf), leaf.astype(total.dtype), 0)

        added, taken = (jax.tree.map(once, leaves, state.total) for leaves in (kept, held))
        change, lost = exact_sum(added, jax.tree.map(jnp.negative, taken))
        moved, lost = (jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), leaves) for leaves in (change, lost))
        total, rest = add(state.total, jax.tree.map(jnp.add, state.rest, lost), moved)
        table = jax.tree.map(lambda table, new: table.at[index].set(new), state.table, kept)
        return estimate, ScaleBySagaState(table, total, rest)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def saga(
    learning_rate: optax.ScalarOrSchedule, num_samples: int, *, table_dtype: jax.typing.DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""The SAGA optimizer: steps against SAGA's estimate of the mean gradient.

    .. math:: w \leftarrow w - \gamma v

    Where every sample's loss is convex with an L-Lipschitz gradient, steps of 1/(3 L) converge, linearly where the mean
    is strongly convex.

    Args:
        learning_rate: The step's length, a number or a schedule of the number of steps taken.
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


def _checked(index, updates, table):
    index = jnp.asarray(index)
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
    if not index.size or (is_concrete(index) and (int(index.min()) < 0 or int(index.max()) >= count)):
        raise ValueError(f"index is {index}; expected at least one number, from 0 to {count - 1}")
    for (path, leaf), held in zip(jax.tree.leaves_with_path(updates), jax.tree.leaves(table), strict=True):
        expected = (*index.shape, *held.shape[1:])
        if leaf.shape != expected:
            raise ValueError(
                f"updates{jax.tree_util.keystr(path)} has shape {leaf.shape}; expected {expected}"
                + (", a gradient for each sample, as jax.vmap(jax.grad(loss), (None, 0)) gives" if index.ndim else "")
            )
    return index
