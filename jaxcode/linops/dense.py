"""Operators given as a matrix."""

from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._pytree import pytree
from .abstract import AbstractLinop, Mask, Results, Rows, allow_transfers, has_numpy_leaves, hide_undefined
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
        return matmul(self.entries.astype(rows.dtype), rows)

    def unmasked_product(self, rows: Rows) -> tuple[Results, Bool[Array, ""] | bool]:
        results = matmul(self._clear_absent(self.entries.astype(rows.dtype)), rows)
        # Finite values in absent rows are multiplied by zero; NaN and inf make every result of their feature NaN.
        return results, True if self.present is None else jnp.all(jnp.isfinite(results[0]))

    def amplification(self) -> Float[Array, ""] | float:
        hi, present = self.entries.hi, True if self.present is None else self.present
        if has_numpy_leaves(self):
            return float(np.abs(hi).sum(axis=1, where=present).max())
        return jnp.max(jnp.sum(jnp.abs(jnp.asarray(hi)), axis=1, where=present))

    def matrix(self) -> Float[Array, "results rows"]:
        with allow_transfers():
            return hide_undefined(self, self._clear_absent(jnp.asarray(self.entries.hi)))

    def _clear_absent(self, entries):
        """Sets the columns of absent rows to zero."""
        return entries if self.present is None else entries * jnp.asarray(self.present, entries.dtype)[None]


def matmul(matrix: Array, rows: Rows) -> Results:
    """Multiplies at the highest precision: in float64, or accumulated in float32 for narrower rows."""
    # Float64 is not requested by name: batched with x64 off, the name would be taken for float32.
    is_narrow = jnp.finfo(rows.dtype).bits < 32
    if is_narrow:
        # Fused with what computes the matrix, some products of narrow numbers are refused by jaxlib 0.12 on CPUs.
        matrix = jax.lax.optimization_barrier(matrix)
    return jax.lax.dot(
        matrix,
        rows,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32 if is_narrow else None,
    )
