"""Operators whose results are rows of the data."""

from typing import final

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._pytree import pytree
from .abstract import AbstractLinop, Mask, Results, Rows, allow_transfers, hide_undefined


@final
@pytree("num_rows", eq=False)
class Gather(AbstractLinop):
    """Selects rows: result k is row `index[k]`, in the data's dtype, bit for bit.

    Attributes:
        index: Which row each result is, shape (p,).
        num_rows: n, static.
        present: As in `AbstractLinop`.
        defined: As in `AbstractLinop`.
    """

    index: Int[Array | np.ndarray, "results"]
    num_rows: int
    present: Mask = None
    defined: Mask = None

    @property
    def mixes(self) -> bool:
        return False

    def product(self, rows: Rows) -> Results:
        return jnp.take(rows, jnp.asarray(self.index), axis=0)

    def unmasked_product(self, rows: Rows) -> tuple[Results, bool]:
        return self.product(rows), True

    def amplification(self) -> float:
        return 1.0

    def matrix(self) -> Float[Array, "results rows"]:
        with allow_transfers():
            index = jnp.asarray(self.index)
            is_selected = index[:, None] == jnp.arange(self.num_rows, dtype=index.dtype)[None]
            return hide_undefined(self, is_selected.astype(jnp.result_type(float)))
