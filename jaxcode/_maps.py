"""Linear maps from rows of data to rows of results, the same for every feature: few rows, many features."""

import abc
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact, Int, PyTree

from ._checks import is_concrete
from ._float64 import Halves, as_arguments
from ._pytree import pytree

Rows = Inexact[Array, "*groups rows features"]
Results = Inexact[Array, "*groups results features"]
Mask = Bool[Array | np.ndarray, "_"] | None

# Rounding of single-precision products grows with the sum of magnitudes in a row of the matrix. Beyond this it would
# show, and the product is computed again in double precision.
_MAX_AMPLIFICATION = 16.0
# Up to so many numbers, hiding those that are not read costs nothing; of more it would be a copy of them all.
_FEW = 2**20
# Numbers of which a product is computed again at a time, so that it needs little memory.
_AT_ONCE = 2**18


class AbstractMap(abc.ABC):
    """Takes n rows of data to p rows of results.

    Attributes:
        reads: Which rows are read, bool (n,); what the others hold has no effect. All of them if None.
        gives: Which results there are, bool (p,); the others are NaN. All of them if None.
    """

    reads: Mask
    gives: Mask

    @abc.abstractmethod
    def in_numpy(self) -> bool:
        """Whether NumPy holds all of it, so that it is known now, whatever program is being traced."""

    @abc.abstractmethod
    def product(self, rows: Rows) -> Results:
        """The results, in float64 or float32; those that there are not are finite but mean nothing."""

    @abc.abstractmethod
    def quick_product(self, rows: Rows) -> tuple[Results, Bool[Array, ""] | bool]:
        """The product without hiding what rows hold that are not read, and whether it came out right all the same."""

    @abc.abstractmethod
    def amplification(self) -> Float[Array, ""] | float:
        """By how much rounding errors of the data may grow."""

    @abc.abstractmethod
    def matrix(self) -> Float[Array, "results rows"]:
        """The map as a matrix, with zeros for rows that are not read and NaN where there are no results."""


@pytree(eq=False)
class Matrix(AbstractMap):
    """A matrix.

    Attributes:
        entries: Shape (p, n); NaN where there are no results, else finite. Those in columns of rows that are not read
            mean nothing.
        reads: As in `AbstractMap`.
        gives: As in `AbstractMap`.
    """

    entries: Halves
    reads: Mask = None
    gives: Mask = None

    def in_numpy(self) -> bool:
        return _in_numpy(self.entries.high) and _in_numpy(self.reads) and _in_numpy(self.gives)

    def product(self, rows: Rows) -> Results:
        if self.reads is not None:
            rows = jnp.where(self.reads[:, None], rows, jnp.zeros((), rows.dtype))
        return dot(self._entries(rows.dtype), rows)

    def quick_product(self, rows: Rows) -> tuple[Results, Bool[Array, ""] | bool]:
        results = dot(self._hidden(self._entries(rows.dtype)), rows)
        # Finite values are multiplied by zero; others make every result of their feature NaN.
        return results, True if self.reads is None else jnp.all(jnp.isfinite(results[..., 0, :]))

    def amplification(self) -> Float[Array, ""] | float:
        high, reads = self.entries.high, True if self.reads is None else self.reads
        if self.in_numpy():
            return float(np.abs(high).sum(axis=1, where=reads).max())
        return jnp.max(jnp.sum(jnp.abs(jnp.asarray(high)), axis=1, where=reads))

    def matrix(self) -> Float[Array, "results rows"]:
        entries = self._hidden(jnp.asarray(self.entries.high))
        return entries if self.gives is None else jnp.where(self.gives[:, None], entries, jnp.nan)

    def _entries(self, dtype):
        if dtype == jnp.float64:
            return self.entries.whole()
        # Narrow data meet a matrix as narrow: rounding it errs no more than rounding the data did.
        return jnp.asarray(self.entries.high).astype(dtype)

    def _hidden(self, entries):
        """With zeros in columns of rows that are not read, but for NaN."""
        return entries if self.reads is None else entries * jnp.asarray(self.reads)


@pytree("num_rows", eq=False)
class Selection(AbstractMap):
    """Every result is one of the rows.

    Attributes:
        index: Which row, shape (p,).
        num_rows: n, static.
        reads: As in `AbstractMap`.
        gives: As in `AbstractMap`.
    """

    index: Int[Array | np.ndarray, "results"]
    num_rows: int
    reads: Mask = None
    gives: Mask = None

    def in_numpy(self) -> bool:
        return _in_numpy(self.index) and _in_numpy(self.reads) and _in_numpy(self.gives)

    def product(self, rows: Rows) -> Results:
        return jnp.take(rows, jnp.asarray(self.index), axis=-2)

    def quick_product(self, rows: Rows) -> tuple[Results, bool]:
        return self.product(rows), True

    def amplification(self) -> float:
        return 1.0

    def matrix(self) -> Float[Array, "results rows"]:
        chosen = jnp.asarray(self.index)[:, None] == jnp.arange(self.num_rows)
        entries = chosen.astype(jnp.result_type(float))
        return entries if self.gives is None else jnp.where(self.gives[:, None], entries, jnp.nan)


def _in_numpy(array):
    return array is None or isinstance(array, np.ndarray)


def at_once(prepare: Callable[..., AbstractMap], *known: np.ndarray) -> AbstractMap:
    """A map that follows from what is known now, computed now, although a program may be being traced."""
    try:
        found = prepare(*known)
        if found.in_numpy() or is_concrete(found):
            return found
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError):
        pass
    # It became part of that program. Not so from the start: inside, even the constants of what is compiled are compiled
    # one by one.
    with jax.ensure_compile_time_eval():
        return prepare(*known)


def apply(linear: AbstractMap, rows: Rows, *, precisely: bool = True) -> Results:
    """The results in the data's dtype.

    Wide data are multiplied as they are, once. Where a row that is not read has spoilt that by not being finite, or
    there are results missing, it is done again with care, a few features at a time.

    Args:
        linear: The map.
        rows: The data. Float32 stays float32, narrower data are multiplied as they are and summed in float32.
        precisely: In float32, maps with large entries of both signs have products that cancel and leave few digits.
            This finds them and computes them again in double precision.
    """
    precisely = precisely and rows.dtype == jnp.float32
    if precisely and linear.in_numpy():
        precisely = bool(linear.amplification() > _MAX_AMPLIFICATION)
    linear = as_arguments(linear)
    if not rows.size or (not precisely and (rows.size <= _FEW or (linear.reads is None and linear.gives is None))):
        return _plainly(linear, rows)
    return _watchfully(precisely, linear, rows)


def apply_plainly(linear: AbstractMap, rows: Rows) -> Results:
    """The results in the data's dtype, with no second look."""
    results = linear.product(rows).astype(rows.dtype)
    return results if linear.gives is None else jnp.where(linear.gives[:, None], results, jnp.nan)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _apply_watchfully(precisely, linear, rows):
    if rows.size <= _FEW:
        results = apply_plainly(linear, rows)
    else:
        results, right = linear.quick_product(rows)
        if linear.gives is not None:
            right = right & jnp.all(linear.gives)
        results = results.astype(rows.dtype)
        if right is not True:
            results = _again(right, functools.partial(apply_plainly, linear), rows, results)
    if precisely:
        results = _again(
            linear.amplification() <= _MAX_AMPLIFICATION, functools.partial(_in_double, linear), rows, results
        )
    return results


def _in_double(linear, rows):
    with jax.enable_x64(True):
        return apply_plainly(linear, rows.astype(jnp.float64)).astype(rows.dtype)


def _again(right, product, rows, results):
    """Computes results again where they are not right, so few features at a time that it takes little memory."""
    features = rows.shape[-1]
    # All narrow data at once: on CPUs a part of them is only had by widening the whole.
    narrow = jnp.finfo(rows.dtype).bits < 32
    width = features if narrow else min(-(-_AT_ONCE * features // rows.size), features)
    passes = -(-features // width)

    def compute(i, results):
        start = jnp.minimum(i * width, features - width)
        # Tied to i, or where there is one pass only the compiler would compute it always, before the loop.
        some, _ = jax.lax.optimization_barrier((jax.lax.dynamic_slice_in_dim(rows, start, width, axis=-1), i))
        return jax.lax.dynamic_update_slice_in_dim(results, product(some), start, axis=-1)

    return jax.lax.fori_loop(0, jnp.where(right, 0, passes), compute, results)


@_apply_watchfully.defjvp
def _apply_watchfully_jvp(precisely, primals, tangents):
    return _apply_watchfully(precisely, *primals), jax.jvp(apply_plainly, primals, tangents)[1]


# Compiled for those who call outside of jit, where loops would compile again at every call.
_plainly = jax.jit(apply_plainly, inline=True)
_watchfully = jax.jit(_apply_watchfully, inline=True, static_argnums=0)


def dot(matrix: Array, rows: Rows) -> Results:
    """The product over the last but one axis of rows, in float64, or float32 for narrower rows."""
    groups = rows.ndim - 2
    # With as many matrices as groups, rows are read where they lie; one matrix for all would have them moved.
    matrix = jnp.broadcast_to(matrix, (*rows.shape[:groups], *matrix.shape))
    batch = tuple(range(groups))
    # Not named for float64: batched with x64 off, the name would be taken for float32.
    narrow = jnp.finfo(rows.dtype).bits < 32
    return jax.lax.dot_general(
        matrix,
        rows,
        (((groups + 1,), (groups,)), (batch, batch)),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32 if narrow else None,
    )


def apply_to_tree(name: str, linear: AbstractMap, tree: PyTree[Array], num_rows: int) -> PyTree[Array]:
    """Applies a map to every leaf (n, ...), its trailing axes flattened for the while; integers become float32.

    Raises:
        ValueError: If a leaf's leading axis is not n, or its dtype is not real.
    """

    def on_leaf(path, leaf):
        leaf = _real(name + jax.tree_util.keystr(path), leaf)
        if leaf.ndim < 1 or leaf.shape[0] != num_rows:
            shape = f"{name}{jax.tree_util.keystr(path)} has shape {leaf.shape}"
            raise ValueError(f"{shape}; expected a leading axis of {num_rows}")
        results = apply(linear, leaf.reshape(num_rows, math.prod(leaf.shape[1:])))
        return results.reshape(results.shape[0], *leaf.shape[1:])

    return jax.tree_util.tree_map_with_path(on_leaf, tree)


def apply_to_groups(
    name: str, linear: AbstractMap, tree: PyTree[Array], groups: int, *, whole: bool = False
) -> PyTree[Array]:
    """Applies a map to groups of rows that lie one after the other: leaves (groups n, ...) to (groups p, ...).

    Float32 products that cancel stay as they are: a model's answers are not that precise. The whole at once, even if
    there are many features, where data lie on several devices.

    Raises:
        ValueError: If a leaf's dtype is not real.
    """

    def on_leaf(path, leaf):
        leaf = _real(name + jax.tree_util.keystr(path), leaf)
        rows = leaf.reshape(groups, leaf.shape[0] // groups, math.prod(leaf.shape[1:]))
        results = _plainly(linear, rows) if whole else apply(linear, rows, precisely=False)
        return results.reshape(groups * results.shape[1], *leaf.shape[1:])

    return jax.tree_util.tree_map_with_path(on_leaf, tree)


def _real(name, leaf):
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        leaf = leaf.astype(jnp.float32)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {leaf.dtype}; expected real numbers, which can be mixed")
    return leaf
