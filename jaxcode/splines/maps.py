"""Smoothing splines as maps from data to values: which solver prepares them, and in which form."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from .._checks import is_concrete
from .._float64 import Halves, halve, in_float64, is_halves
from .._maps import AbstractMap, Mask, Matrix, Results, Rows, apply_plainly, dot
from .._pytree import pytree
from .banded import banded_matrix
from .downdate import downdated_matrix
from .sequence import Sequence, arrange
from .two_filter import Blocks, Moves, blocks_by_filters, find_moves, matrix_by_filters

# With more knots and points than this, blocks are faster than one matrix, for wide data on a CPU as measured by
# `tests/benchmarks/wide.py`. For data of few columns blocks win from 128 on, by less than a millisecond.
MOST_IN_ONE_MATRIX = 384
ENTRIES_IN_A_BLOCK = 48


def spline_map(
    knots: Array | np.ndarray, points: Array | np.ndarray, smoothing: ArrayLike, weights: Array | np.ndarray
) -> AbstractMap:
    r"""The smoothing spline through data at knots, read at points.

    What is known now is prepared on the host, which compiles nothing; what is not, by the traced program.

    Args:
        knots: Shape (n,), ascending; neighbours may be equal.
        points: Shape (p,), ascending.
        smoothing: :math:`\mu \ge 0`.
        weights: Shape (n,), not negative, or bool; rows of weight zero are not read.

    Returns:
        The map. Its results are NaN with data at fewer than two knots.
    """
    n, p = knots.shape[0], points.shape[0]
    if n + p > MOST_IN_ONE_MATRIX or not all(map(is_concrete, (weights, knots, points, smoothing))):
        return _traced_map(knots, points, smoothing, weights)
    knots, points, weights = np.asarray(knots, np.float64), np.asarray(points, np.float64), np.asarray(weights)
    smoothing = float(smoothing)  # pyright: ignore[reportArgumentType]
    if weights.dtype == bool:
        entries = downdated_matrix(knots, points, weights, smoothing)
        if entries is not None:
            return Matrix(halve(entries), weights)
    entries, reads = banded_matrix(knots, points, weights.astype(np.float64), smoothing), weights > 0
    return Matrix(halve(entries), None if reads.all() else reads)


def _traced_map(knots, points, smoothing, weights):
    knots, points, weights = (np.asarray(a, np.float64) if is_concrete(a) else a for a in (knots, points, weights))
    n, p = knots.shape[0], points.shape[0]
    xp = np if isinstance(weights, np.ndarray) else jnp
    reads = None if xp is np and weights.all() else xp.asarray(weights) > 0
    gives = None if reads is None else xp.broadcast_to(reads.sum() >= 2, (p,))
    weights = jnp.asarray(weights, jnp.result_type(float))
    one_matrix = n + p <= MOST_IN_ONE_MATRIX
    sequence = _arrange(knots, points, None if one_matrix else ENTRIES_IN_A_BLOCK)
    gaps = find_moves(sequence, knots, points) if is_concrete((knots, points)) else (knots, points)
    if one_matrix:
        return Matrix(halve(_as_matrix(sequence, gaps, weights, smoothing)), reads, gives)
    blocks = _as_blocks(sequence, gaps, weights, smoothing)
    return BlockMap(sequence, jax.tree.map(halve, blocks), n, p, reads, gives)


def _solver(by_filters):
    """In float64, from the moves over the gaps, or from knots and points where those are traced."""

    def solve(sequence, gaps, weights, smoothing):
        moves = gaps if isinstance(gaps, Moves) else find_moves(sequence, *gaps)
        return by_filters(sequence, moves, weights, smoothing)

    return in_float64(jax.jit(solve))


_as_matrix, _as_blocks = _solver(matrix_by_filters), _solver(blocks_by_filters)


def _arrange(knots, points, block):
    if is_concrete((knots, points)):
        return arrange(knots, points, block)
    with jax.enable_x64(True):
        knots, points = (jax.lax.stop_gradient(jnp.asarray(a).astype(jnp.float64)) for a in (knots, points))
        return arrange(knots, points, block)


@pytree("num_rows", "num_results", eq=False)
class BlockMap(AbstractMap):
    """A spline between many knots and points, in time and memory proportional to their number.

    Attributes:
        sequence: Where each block finds its rows and leaves its results.
        blocks: Each block's matrices, their numbers in `Halves`.
        num_rows: n, static.
        num_results: p, static.
        reads: As in `AbstractMap`.
        gives: As in `AbstractMap`.
    """

    sequence: Sequence
    blocks: Blocks
    num_rows: int
    num_results: int
    reads: Mask = None
    gives: Mask = None

    def in_numpy(self) -> bool:
        return False

    def product(self, rows: Rows) -> Results:
        if rows.ndim > 2:
            return jax.vmap(self.product)(rows)
        if rows.dtype == jnp.float64:
            blocks = jax.tree.map(Halves.whole, self.blocks, is_leaf=is_halves)
        else:
            blocks = jax.tree.map(lambda h: jnp.asarray(h.high, jnp.float32), self.blocks, is_leaf=is_halves)
        first_row, first_point = (jnp.asarray(a) for a in (self.sequence.first_row, self.sequence.first_point))
        features, points, wide = rows.shape[1], self.sequence.points, blocks.forward.dtype

        def read(first):
            def part_of(array):
                return jax.lax.dynamic_slice_in_dim(array, first, self.sequence.rows)

            some = part_of(rows)
            if self.reads is not None:
                some = jnp.where(part_of(jnp.asarray(self.reads))[:, None], some, jnp.zeros((), some.dtype))
            return some.astype(wide)

        def go_right(left, block):
            first, forward = block
            return dot(forward, jnp.concatenate([read(first), left])), left

        def go_left(carry, block):
            right, results = carry
            first, at, backward, left = block
            out = dot(backward, jnp.concatenate([read(first), right, left]))
            # Blocks may overlap in places where all but one give zeros.
            given = jax.lax.dynamic_slice_in_dim(results, at, points) + out[:points].astype(results.dtype)
            return (out[points:], jax.lax.dynamic_update_slice_in_dim(results, given, at, axis=0)), None

        _, left = jax.lax.scan(go_right, jnp.zeros((5, features), wide), (first_row, blocks.forward))
        nothing = jnp.zeros((4, features), wide), jnp.zeros((self.num_results, features), rows.dtype)
        along = (first_row, first_point, blocks.backward, left)
        (_, results), _ = jax.lax.scan(go_left, nothing, along, reverse=True)
        return results

    def quick_product(self, rows: Rows) -> tuple[Results, bool]:
        return self.product(rows), True

    def amplification(self) -> Float[Array, ""]:
        """By the block's own data, and by the filters' states from data beyond as large as unit noise makes them."""
        forward, backward = (jnp.asarray(h.high) for h in jax.tree.leaves(self.blocks, is_leaf=is_halves))
        data, points = self.sequence.rows, self.sequence.points

        def spread(moves, reverse):
            """Standard deviations of the states that a filter enters each block with."""

            def step(covariance, move):
                push_data, push_state = move[:, :data], move[:, data:]
                after = push_state @ covariance @ push_state.T + push_data @ push_data.T
                return after, jnp.sqrt(jnp.maximum(jnp.diagonal(covariance), 0))

            start = jnp.zeros((moves.shape[1], moves.shape[1]), moves.dtype)
            return jax.lax.scan(step, start, moves, reverse=reverse)[1]

        states = spread(backward[:, points:, : data + 4], True), spread(forward, False)
        to_points = jnp.abs(backward[:, :points])
        beyond = to_points[..., data:] @ jnp.concatenate(states, axis=-1)[..., None]
        return jnp.max(jnp.sum(to_points[..., :data], axis=-1) + beyond[..., 0])

    def matrix(self) -> Float[Array, "results rows"]:
        with jax.enable_x64(True):
            entries = apply_plainly(self, jnp.eye(self.num_rows, dtype=jnp.float64))
        return entries.astype(jnp.result_type(float))
