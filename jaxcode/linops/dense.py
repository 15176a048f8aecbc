"""Operators given as a matrix."""

from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._pytree import pytree
from .abstract import AbstractLinop, Mask, Results, Rows, is_static, transfers_allowed
from .double_single import DoubleSingle


@final
@pytree(eq=False)
class Dense(AbstractLinop):
    """Multiplies by a matrix of shape (p, n), with n and p a few hundred at most.

    Attributes:
        entries: The matrix in float64, from `split`; NaN where results are not defined, else finite. Columns of absent
            rows may hold any finite number.
        present: As in `AbstractLinop`.
        defined: As in `AbstractLinop`.

    >>> from jaxcode.linops import apply, split
    >>> apply(Dense(split(np.array([[0.5, 0.5]]))), jnp.array([[1.0], [3.0]]))
    Array([[2.]], dtype=float32)
    """

    entries: DoubleSingle
    present: Mask = None
    defined: Mask = None

    @property
    def mixes(self) -> bool:
        return True

    def product(self, rows: Rows) -> Results:
        if self.present is not None:
            rows = jnp.where(self.present[:, None], rows, jnp.zeros((), rows.dtype))
        return matmul(self._entries(rows.dtype), rows)

    def unmasked_product(self, rows: Rows) -> tuple[Results, Bool[Array, ""] | bool]:
        results = matmul(self._with_zero_columns(self._entries(rows.dtype)), rows)
        # Finite values in absent rows are multiplied by zero; NaN and inf make every result of their feature NaN.
        return results, True if self.present is None else jnp.all(jnp.isfinite(results[0]))

    def amplification(self) -> Float[Array, ""] | float:
        hi, present = self.entries.hi, True if self.present is None else self.present
        if is_static(self):
            return float(np.abs(hi).sum(axis=1, where=present).max())
        return jnp.max(jnp.sum(jnp.abs(jnp.asarray(hi)), axis=1, where=present))

    def matrix(self) -> Float[Array, "results rows"]:
        with transfers_allowed():
            entries = self._with_zero_columns(jnp.asarray(self.entries.hi))
            return entries if self.defined is None else jnp.where(self.defined[:, None], entries, jnp.nan)

    def _entries(self, dtype):
        if dtype == jnp.float64:
            return self.entries.combine()
        # Rounding the matrix to the dtype of narrow data adds no larger error than rounding the data did.
        return jnp.asarray(self.entries.hi).astype(dtype)

    def _with_zero_columns(self, entries):
        return entries if self.present is None else entries * jnp.asarray(self.present, entries.dtype)[None]


def matmul(matrix: Array, rows: Rows) -> Results:
    """Multiplies at the highest precision: in float64, or accumulated in float32 for narrower rows."""
    # Float64 is not requested by name: batched with x64 off, the name would be taken for float32.
    narrow = jnp.finfo(rows.dtype).bits < 32
    if narrow:
        # Fused with what computes the matrix, some products of narrow numbers are refused by jaxlib 0.12 on CPUs.
        matrix = jax.lax.optimization_barrier(matrix)
    return jax.lax.dot(
        matrix,
        rows,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32 if narrow else None,
    )
