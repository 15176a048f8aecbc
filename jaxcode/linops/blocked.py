"""Operators applied block by block in two sweeps, in time and memory proportional to the number of rows."""

from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._float64 import double_precision
from .._pytree import pytree
from .abstract import AbstractLinop, Mask, Results, Rows, apply_in_one_pass
from .dense import matmul
from .double_single import DoubleSingle


@final
@pytree("num_rows", "num_results", "block_rows", eq=False)
class Blocked(AbstractLinop):
    """Applies a state-space smoother in blocks: a sweep from the left, then one from the right that gives the results.

    Each block reads `block_rows` consecutive rows. With l and r the sizes of the left and the right state, the first
    sweep takes (rows, left state) to the left state after the block; the second takes (rows, right state, left state)
    to (results, right state before the block).

    Attributes:
        first_row: The first row that each block reads, shape (blocks,).
        first_result: The first result that each block adds to, shape (blocks,).
        forward: The first sweep's matrices, shape (blocks, l, block_rows + l).
        backward: The second sweep's matrices, shape (blocks, results + r, block_rows + r + l).
        num_rows: n, static.
        num_results: p, static.
        block_rows: Rows that a block reads, static.
        present: As in `AbstractLinop`.
        defined: As in `AbstractLinop`.
    """

    first_row: Int[Array | np.ndarray, "blocks"]
    first_result: Int[Array | np.ndarray, "blocks"]
    forward: DoubleSingle
    backward: DoubleSingle
    num_rows: int
    num_results: int
    block_rows: int
    present: Mask = None
    defined: Mask = None

    @property
    def mixes(self) -> bool:
        return True

    def product(self, rows: Rows) -> Results:
        dtype = rows.dtype if rows.dtype == jnp.float64 else jnp.float32
        forward, backward = self.forward.astype(dtype), self.backward.astype(dtype)
        left_size, right_size, results_size = self._sizes()
        first_row, first_result = jnp.asarray(self.first_row), jnp.asarray(self.first_result)
        features = rows.shape[1]

        def read(start):
            def slice_block(array):
                return jax.lax.dynamic_slice_in_dim(array, start, self.block_rows)

            block = slice_block(rows)
            if self.present is not None:
                block = jnp.where(slice_block(jnp.asarray(self.present))[:, None], block, jnp.zeros((), block.dtype))
            return block.astype(dtype)

        def sweep_right(left_state, block):
            start, matrix = block
            return matmul(matrix, jnp.concatenate([read(start), left_state])), left_state

        def sweep_left(carry, block):
            right_state, results = carry
            start, result_start, matrix, left_state = block
            output = matmul(matrix, jnp.concatenate([read(start), right_state, left_state]))
            # Blocks may overlap in results; all but one of them add zeros there.
            totals = jax.lax.dynamic_slice_in_dim(results, result_start, results_size)
            totals = totals + output[:results_size].astype(results.dtype)
            results = jax.lax.dynamic_update_slice_in_dim(results, totals, result_start, axis=0)
            return (output[results_size:], results), None

        _, left_state = jax.lax.scan(sweep_right, jnp.zeros((left_size, features), dtype), (first_row, forward))
        start = jnp.zeros((right_size, features), dtype), jnp.zeros((self.num_results, features), rows.dtype)
        (_, results), _ = jax.lax.scan(sweep_left, start, (first_row, first_result, backward, left_state), reverse=True)
        return results

    def unmasked_product(self, rows: Rows) -> tuple[Results, bool]:
        return self.product(rows), True

    def amplification(self) -> Float[Array, ""]:
        """Bounds the amplification by each block's rows and states.

        States count by their standard deviations when every row of data is unit noise.

        Returns:
            The largest bound over all results.
        """
        forward, backward = jnp.asarray(self.forward.hi), jnp.asarray(self.backward.hi)
        _, right_size, results_size = self._sizes()

        def compute_deviations(matrices, reverse):
            """Computes the standard deviations of the states with which a sweep enters each block."""

            def step(covariance, matrix):
                row_matrix, state_matrix = matrix[:, : self.block_rows], matrix[:, self.block_rows :]
                next_covariance = state_matrix @ covariance @ state_matrix.T + row_matrix @ row_matrix.T
                return next_covariance, jnp.sqrt(jnp.maximum(jnp.diagonal(covariance), 0))

            start = jnp.zeros((matrices.shape[1], matrices.shape[1]), matrices.dtype)
            return jax.lax.scan(step, start, matrices, reverse=reverse)[1]

        right_deviations = compute_deviations(backward[:, results_size:, : self.block_rows + right_size], True)
        state_deviations = jnp.concatenate([right_deviations, compute_deviations(forward, False)], axis=-1)
        magnitudes = jnp.abs(backward[:, :results_size])
        state_part = (magnitudes[..., self.block_rows :] @ state_deviations[..., None])[..., 0]
        return jnp.max(jnp.sum(magnitudes[..., : self.block_rows], axis=-1) + state_part)

    def matrix(self) -> Float[Array, "results rows"]:
        with double_precision():
            entries = apply_in_one_pass(self, jnp.eye(self.num_rows, dtype=jnp.float64))
        return entries.astype(jnp.result_type(float))

    def _sizes(self):
        """Returns the sizes of the left state, of the right state, and of a block's results."""
        left_size = self.forward.hi.shape[1]
        right_size = self.backward.hi.shape[2] - self.block_rows - left_size
        return left_size, right_size, self.backward.hi.shape[1] - right_size
