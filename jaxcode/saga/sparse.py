"""Stores sparse samples of linear models."""

import sys
from typing import Any, final

import numpy as np
import scipy.sparse
from jax.core import Tracer
from jaxtyping import Array, Integer, Shaped

from .._pytree import pytree


@final
@pytree("num_columns", eq=False)
class SparseRows:
    """Holds samples with few non-zero entries, each row padded with zeros to the length of the longest.

    A step of `DistributedSaga` on such rows takes time in proportion to d or, where d is more than 64 times the length
    of the longest row, to that length and a thirty-second of d.

    Attributes:
        indices: Columns of the entries, integers, shape (n, longest); no column twice in a row, except for zeros.
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
        """Converts a sparse matrix or array of SciPy; entries at the same position are added up."""
        rows = matrix.tocsr()
        if not rows.has_canonical_format:
            rows = rows.copy()
            rows.sum_duplicates()
        counts = np.diff(rows.indptr)
        has_entry = np.arange(max(1, counts.max(initial=0))) < counts[:, None]
        indices, values = np.zeros(has_entry.shape, np.int32), np.zeros(has_entry.shape, rows.dtype)
        indices[has_entry], values[has_entry] = rows.indices, rows.data
        return SparseRows(indices, values, rows.shape[1])

    @staticmethod
    def from_bcoo(matrix: Any) -> "SparseRows":
        """Converts a `jax.experimental.sparse.BCOO` matrix, on the host; entries at the same position are added up.

        Raises:
            ValueError: If it is traced, or is no matrix whose entries are single numbers.
        """
        if any(isinstance(part, Tracer) for part in (matrix.data, matrix.indices)):
            raise ValueError("x is a traced BCOO; expected SparseRows under jit: SparseRows.from_bcoo(x) outside of it")
        if matrix.ndim != 2 or matrix.n_dense or matrix.n_batch > 1:
            raise ValueError(
                f"x is a BCOO of shape {matrix.shape} with n_batch={matrix.n_batch} and n_dense={matrix.n_dense}; "
                "expected a matrix with n_batch 0 or 1 and n_dense 0: x.update_layout(n_batch=0, n_dense=0)"
            )
        values, indices = np.asarray(matrix.data), np.asarray(matrix.indices)
        if matrix.n_batch:
            row_numbers = np.broadcast_to(np.arange(matrix.shape[0])[:, None, None], indices.shape)
            indices = np.concatenate([row_numbers, indices], axis=2).reshape(-1, 2)
            values = values.reshape(-1)
        # BCOO pads with entries outside of the matrix.
        valid = np.all(indices < np.array(matrix.shape), axis=1)
        rows, columns = indices[valid].T
        # SciPy has no arrays of half-precision numbers.
        values = values[valid] if values.dtype.itemsize > 2 else values[valid].astype(np.float32)
        return SparseRows.from_scipy(scipy.sparse.coo_array((values, (rows, columns)), shape=matrix.shape))


def is_foreign_sparse(x: Any) -> bool:
    """Returns whether x is a sparse array of SciPy or of `jax.experimental.sparse`."""
    # Such an array exists only if its module is imported; an import just for this check takes a tenth of a second.
    module = sys.modules.get("jax.experimental.sparse")
    return scipy.sparse.issparse(x) or (module is not None and isinstance(x, module.JAXSparse))


def to_sparse_rows(x: Any) -> SparseRows:
    """Converts a sparse array of SciPy or of `jax.experimental.sparse`.

    Raises:
        ValueError: If it is of another kind than SciPy's, BCOO and BCSR, or traced.
    """
    if scipy.sparse.issparse(x):
        return SparseRows.from_scipy(x)
    kind = type(x).__name__
    if kind not in ("BCOO", "BCSR"):
        raise ValueError(
            f"x is a {kind} of jax.experimental.sparse; expected a BCOO or BCSR, SparseRows, or dense rows"
        )
    return SparseRows.from_bcoo(x.to_bcoo() if kind == "BCSR" else x)
