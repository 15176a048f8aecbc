"""Losses of linear models, whose gradients are one number (or one per class) for each sample, and sparse samples."""

from collections.abc import Callable, Mapping
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Integer, PyTree, Shaped

from .._pytree import pytree
from ..checks import is_concrete


@final
@pytree("num_columns", eq=False)
class SparseRows:
    """Samples with few entries that are not zero, each row filled up with zeros to the length of the longest.

    A step of `DistributedSaga` on such rows takes time in proportion to d, or, where d is more than 64 times the length
    of the longest, to that length and a thirty-second of d.

    Attributes:
        indices: Columns of the entries, integers, shape (n, longest); no column twice in a row, but for zeros.
        values: Entries, shape (n, longest).
        num_columns: d.

    >>> import scipy.sparse
    >>> rows = SparseRows.from_scipy(scipy.sparse.csr_matrix([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]]))
    >>> rows.values.shape, rows.num_columns
    ((2, 2), 3)
    """

    indices: Integer[Array | np.ndarray, "*rows longest"]
    values: Shaped[Array | np.ndarray, "*rows longest"]
    num_columns: int

    @staticmethod
    def from_scipy(matrix: Any) -> "SparseRows":
        """From any sparse matrix or array of SciPy; entries at one place are added up."""
        rows = matrix.tocsr()
        if not rows.has_canonical_format:
            rows = rows.copy()
            rows.sum_duplicates()
        counts = np.diff(rows.indptr)
        there = np.arange(max(1, counts.max(initial=0))) < counts[:, None]
        indices, values = np.zeros(there.shape, np.int32), np.zeros(there.shape, rows.dtype)
        indices[there], values[there] = rows.indices, rows.data
        return SparseRows(indices, values, rows.shape[1])


Rows = Array | np.ndarray | SparseRows


@final
@pytree("of_margin", "curvature")
class LinearLoss:
    r"""A loss of a linear model, of parameters and one sample.

    .. math:: \phi_i(w) = \ell(x_i \cdot w, y_i)

    The gradient is x_i times the loss's slope, so that SAGA's table holds one number for each sample, or one for each
    class. Parameters are an array, (d,) or (d, classes), or a mapping of such a "kernel" and a "bias", as Flax has
    them; a sample is a pair of x, an array (d,) or a row of `SparseRows`, and y.

    Attributes:
        of_margin: From x . w, shape () or (classes,), and y to the loss.
        curvature: The largest second derivative of that, of which step sizes are made; None where it is not known.

    >>> loss = LinearLoss(lambda margin, y: optax.huber_loss(margin, y), curvature=1.0)
    >>> loss(jnp.array([1.0, 2.0]), (jnp.array([1.0, 1.0]), 2.5))
    Array(0.125, dtype=float32)
    """

    of_margin: Callable[[Array, Array], Array]
    curvature: float | None = None

    def __call__(self, params: PyTree[Array], sample: tuple[Rows, Any]) -> Float[Array, ""]:
        x, y = sample
        return self.of_margin(margin(params, x), y)


@jax.custom_jvp
def _softplus(x):
    return jax.nn.softplus(x)


# Where only the slope is asked for, no logarithm is taken.
_softplus.defjvps(lambda tangent, _, x: tangent * jax.nn.sigmoid(x))


def _logistic(margin, y):
    # Not a lambda, which would take the derivative above with it to other processes, where it cannot go.
    return _softplus(-y * margin)


logistic = LinearLoss(_logistic, curvature=0.25)
"""Of two classes, y = -1 or 1."""

multinomial = LinearLoss(optax.losses.softmax_cross_entropy_with_integer_labels, curvature=0.5)
"""Of classes that are numbered from 0."""

squared = LinearLoss(lambda margin, y: 0.5 * jnp.square(margin - y), curvature=1.0)
"""Half the square of the distance from y."""


def margin(params: PyTree[Array], x: Rows) -> Array:
    """The product of one sample and the parameters, shape () or (classes,)."""
    kernel, bias = _kernel_and_bias(params)
    product = jnp.tensordot(x.values, kernel[x.indices], 1) if isinstance(x, SparseRows) else x @ kernel
    return product if bias is None else product + bias


def smoothness(curvature: float, params: PyTree[Array], x: Rows) -> Float[Array, "*rows"]:
    r"""L_i: no second derivative of a sample's loss is larger.

    .. math:: L_i = \max \ell'' \, (\|x_i\|^2 + 1[bias])
    """
    values = x.values if isinstance(x, SparseRows) else x
    return curvature * (jnp.sum(jnp.square(values), axis=-1) + isinstance(params, Mapping))


def checked_samples(params: PyTree[Array], data: Any) -> tuple[Rows, Any]:
    """Samples of a linear model, x in the dtype of its parameters: products of whole or half numbers would overflow.

    Raises:
        ValueError: If parameters or samples are not as `LinearLoss` has them, or do not fit each other.
    """
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise ValueError(f"data is a {type(data).__name__}; expected a pair (x, y), as loss is a LinearLoss")
    x, y = data
    if isinstance(params, Mapping) and set(params) != {"kernel", "bias"}:
        raise ValueError(f"params has {sorted(params)}; expected an array, or a 'kernel' and a 'bias'")
    kernel, bias = _kernel_and_bias(params)
    of_kernel = np.shape(kernel)
    if len(of_kernel) not in (1, 2) or (bias is not None and np.shape(bias) != of_kernel[1:]):
        shapes = of_kernel if bias is None else (of_kernel, np.shape(bias))
        raise ValueError(f"params has shape {shapes}; expected (d,) or (d, classes), and a bias of () or (classes,)")
    if isinstance(x, SparseRows):
        shape = (*np.shape(x.values)[:-1], x.num_columns)
        if not jnp.issubdtype(jnp.result_type(x.indices), jnp.integer):
            raise ValueError(f"x.indices has dtype {jnp.result_type(x.indices)}; expected integers")
        if is_concrete(x.indices) and np.size(x.indices):
            least, most = int(x.indices.min()), int(x.indices.max())
            if least < 0 or most >= x.num_columns:
                raise ValueError(f"x.indices is from {least} to {most}; expected 0 to {x.num_columns - 1}, its columns")
    else:
        x = x if isinstance(x, np.ndarray | Array) else jnp.asarray(x)
        shape = x.shape
    if len(shape) != 2 or shape[1] != of_kernel[0]:
        raise ValueError(f"x has shape {shape}; expected (n, {of_kernel[0]}), a column for each entry of params")
    dtype = jnp.result_type(*jax.tree.leaves(params))
    if isinstance(x, SparseRows):
        return SparseRows(x.indices, x.values.astype(dtype), x.num_columns), y
    return x.astype(dtype), y


def _kernel_and_bias(params):
    return (params["kernel"], params["bias"]) if isinstance(params, Mapping) else (params, None)
