"""Checks parameters and samples before anything is compiled."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Shaped

from ..checks import batch_size, is_real, static_value
from ._labels import check_finite
from .linear import LinearLoss, kernel_and_bias
from .sparse import SparseRows, is_foreign_sparse, to_sparse_rows


def check_params(params: PyTree[Any]) -> PyTree[Array]:
    """Checks parameters and converts them to arrays of real numbers.

    Raises:
        ValueError: If there are none, or they are not finite real numbers.
    """
    arrays = jax.tree.map_with_path(_check_leaf, params)
    if not sum(leaf.size for leaf in jax.tree.leaves(arrays)):
        raise ValueError(f"params is {params!r}; expected at least one number to minimise the loss over")
    return arrays


def _check_leaf(path, leaf):
    name = f"params{jax.tree_util.keystr(path)}"
    if not isinstance(leaf, np.ndarray | jax.Array):
        leaf = np.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {leaf.dtype}; expected real numbers in floating point")
    check_finite(name, leaf)
    # What is on the device stays there; the dtype is stated because that of a Python number would be weak.
    return jax.device_put(leaf) if isinstance(leaf, np.ndarray) else leaf.astype(leaf.dtype)


def check_samples(loss: Callable[..., Any], params: PyTree[Array], data: PyTree[Any]) -> PyTree[Any]:
    """Checks samples and converts them to what the loss takes.

    Args:
        loss: From parameters and one sample to one number.
        params: The parameters.
        data: Samples, leaves (n, ...); for a `LinearLoss` a pair of rows and labels.

    Returns:
        The samples; rows of a linear model in the dtype of its parameters, as products of integers or half-precision
        numbers would overflow, and sparse ones as `SparseRows`.

    Raises:
        ValueError: If data do not fit each other, the parameters or the loss, or are not finite.
    """
    data = _check_linear_samples(loss, params, data) if isinstance(loss, LinearLoss) else _check_any_samples(data)
    batch_size("data", data)
    sample = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf)[1:], _dtype(leaf)), data)
    value = jax.eval_shape(loss, params, sample)
    if not isinstance(value, jax.ShapeDtypeStruct) or value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
        results = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", value)
        shapes = jax.tree.map(lambda leaf: leaf.shape, sample)
        raise ValueError(
            f"loss gives {results} for one sample of data, whose shapes are {shapes}; expected one real number: "
            "check the shapes of data, such as that of y, (n,) and not (n, 1)"
        )
    return data


def _check_any_samples(data):
    def check(path, leaf):
        name = f"data{jax.tree_util.keystr(path)}"
        if is_foreign_sparse(leaf):
            raise ValueError(
                f"{name} is a sparse {type(leaf).__name__}; expected dense arrays unless loss is a LinearLoss"
            )
        leaf = leaf if isinstance(leaf, np.ndarray | jax.Array) else np.asarray(leaf)
        if leaf.dtype == object or leaf.dtype.kind in "US":
            raise ValueError(f"{name} has dtype {leaf.dtype}; expected numbers")
        check_finite(name, leaf)
        return leaf

    return jax.tree.map_with_path(check, data, is_leaf=is_foreign_sparse)


def _check_linear_samples(loss, params, data):
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise ValueError(f"data is a {type(data).__name__}; expected a pair (x, y), as loss is a LinearLoss")
    x, y = data
    kernel_shape = _check_linear_params(params)
    dtype = jnp.result_type(*jax.tree.leaves(params))
    x = _check_rows(x, kernel_shape[0], dtype)
    count = np.shape(jax.tree.leaves(x)[0])[0]
    if loss.check_labels is not None:
        y = loss.check_labels(y, jax.ShapeDtypeStruct(kernel_shape[1:], dtype))
    else:
        y = _check_any_samples(y)
    for leaf in jax.tree.leaves(y):
        if np.shape(leaf)[:1] != (count,):
            raise ValueError(f"y has shape {np.shape(leaf)}; expected ({count}, ...), of the same length as x")
    return x, y


def _check_linear_params(params):
    """Checks a linear model's parameters and returns the shape of the kernel."""
    if not isinstance(params, Mapping | Array):
        raise ValueError(f"params is a {type(params).__name__}; expected an array, or a 'kernel' and a 'bias'")
    if isinstance(params, Mapping) and set(params) != {"kernel", "bias"}:
        raise ValueError(f"params has {sorted(params)}; expected an array, or a 'kernel' and a 'bias'")
    kernel, bias = kernel_and_bias(params)
    shape = np.shape(kernel)
    if len(shape) not in (1, 2) or (bias is not None and np.shape(bias) != shape[1:]):
        shapes = shape if bias is None else (shape, np.shape(bias))
        raise ValueError(f"params has shape {shapes}; expected (d,) or (d, classes), and a bias of () or (classes,)")
    return shape


def _check_rows(x, num_columns, dtype) -> Shaped[Array | np.ndarray, "n d"] | SparseRows:
    if is_foreign_sparse(x):
        x = to_sparse_rows(x)
    if isinstance(x, SparseRows):
        shape, values = (*np.shape(x.values)[:-1], x.num_columns), x.values
        _check_indices(x)
    else:
        x = values = x if isinstance(x, np.ndarray | jax.Array) else np.asarray(x)
        shape = x.shape
    if not (is_real(values.dtype) or values.dtype == np.bool_):
        raise ValueError(f"x has dtype {values.dtype}; expected real numbers")
    if len(shape) != 2 or shape[1] != num_columns:
        raise ValueError(f"x has shape {shape}; expected (n, {num_columns}), a column for each entry of params")
    # Numbers that are too large for the dtype become infinite, and are refused.
    with np.errstate(over="ignore"):
        values = values.astype(dtype)
    check_finite("x.values" if isinstance(x, SparseRows) else "x", values)
    return SparseRows(x.indices, values, x.num_columns) if isinstance(x, SparseRows) else values


def _check_indices(x):
    if np.shape(x.indices) != np.shape(x.values):
        raise ValueError(f"x.indices has shape {np.shape(x.indices)}; expected {np.shape(x.values)}, as x.values")
    if not jnp.issubdtype(x.indices.dtype, jnp.integer):
        raise ValueError(f"x.indices has dtype {x.indices.dtype}; expected integers")
    indices = static_value(x.indices)
    if indices is not None and indices.size:
        smallest, largest = int(indices.min()), int(indices.max())
        if smallest < 0 or largest >= x.num_columns:
            raise ValueError(
                f"x.indices is from {smallest} to {largest}; expected 0 to {x.num_columns - 1}, its columns"
            )


def _dtype(leaf):
    return jax.dtypes.canonicalize_dtype(leaf.dtype)
