"""Smoothing splines as linear operators: which solver prepares them, and in which form."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Shaped

from ..._float64 import double_precision, in_float64
from ...checks import static_value
from ...linops import AbstractLinop, Blocked, Dense, split
from ..abstract import Vector, span_of
from .host import host_spline_matrix
from .interleaving import Interleaving, interleave
from .kalman import Transitions, find_transitions, form_blocks, form_matrix

# With more knots and points than this, blocks are faster than one matrix, for wide data on a CPU as measured by
# `python -m tests.benchmarks.wide`. For data of few columns they are so from 128 on, by less than a millisecond.
MAX_ENTRIES_IN_MATRIX = 384
# The work for each row of data grows with the size of a block, the number of sequential steps falls with it.
ENTRIES_PER_BLOCK = 48


def spline_linop(
    knots: Vector,
    points: Vector,
    smoothing: ArrayLike,
    weights: Shaped[Array | np.ndarray, "knots"] | None = None,
) -> AbstractLinop:
    r"""Prepares the smoothing spline through data at knots, evaluated at points.

    From static arguments with n + p of at most MAX_ENTRIES_IN_MATRIX it is prepared on the host, without compilation;
    from more or from others by jitted functions, which compile.

    Args:
        knots: Shape (n,), ascending; neighbours may be equal.
        points: Shape (p,), ascending.
        smoothing: :math:`\mu \ge 0`, relative to the sum, not the mean, of weighted squares.
        weights: Shape (n,), not negative, or bool; rows of weight zero are not read. Ones if not given.

    Returns:
        The operator. Its results are NaN with data at fewer than two knots.
    """
    n, p = knots.shape[0], points.shape[0]
    weights = np.ones(n) if weights is None else weights
    static_arguments = [static_value(argument) for argument in (knots, points, smoothing, weights)]
    static_knots, static_points, static_smoothing, static_weights = static_arguments
    if n + p <= MAX_ENTRIES_IN_MATRIX and all(value is not None for value in static_arguments):
        return _host_linop(np.float64(static_knots), np.float64(static_points), float(static_smoothing), static_weights)  # pyright: ignore[reportArgumentType]
    return _program_linop(
        knots if static_knots is None else static_knots,
        points if static_points is None else static_points,
        smoothing if static_smoothing is None else static_smoothing,
        weights if static_weights is None else static_weights,
    )


def _host_linop(knots, points, smoothing, weights):
    present = weights > 0
    entries = host_spline_matrix(knots, points, weights.astype(np.float64), smoothing)
    return Dense(split(entries), None if present.all() else present)


def _program_linop(knots, points, smoothing, weights):
    n, p = knots.shape[0], points.shape[0]
    xp = np if isinstance(weights, np.ndarray) else jnp
    present = weights if weights.dtype == np.bool_ else weights > 0
    present = None if xp is np and present.all() else present
    defined = None if present is None else xp.broadcast_to(present.sum() >= 2, (p,))
    is_one_matrix = n + p <= MAX_ENTRIES_IN_MATRIX
    block_size = None if is_one_matrix else ENTRIES_PER_BLOCK
    if isinstance(knots, np.ndarray) and isinstance(points, np.ndarray):
        knots, points = np.asarray(knots, np.float64), np.asarray(points, np.float64)
        interleaving, unit = interleave(knots, points, block_size), span_of(knots)
        places = find_transitions(interleaving, knots, points, unit), unit
    else:
        interleaving = _interleave_in_program(knots, points, block_size)
        places = knots, points
    if is_one_matrix:
        return Dense(split(_form_matrix(interleaving, places, smoothing, weights)), present, defined)
    forward, backward = map(split, _form_blocks(interleaving, places, smoothing, weights))
    return Blocked(
        interleaving.first_row, interleaving.first_point, forward, backward, n, p, interleaving.rows, present, defined
    )


def _compile_in_float64(form):
    """Compiles a function of `kalman`, given (transitions, unit) or, where places are traced, (knots, points)."""

    def form_from_places(interleaving, places, smoothing, weights):
        if isinstance(places[0], Transitions):
            transitions, unit = places
        else:
            knots, points = places
            unit = span_of(knots)
            transitions = find_transitions(interleaving, knots, points, unit)
        return form(interleaving, transitions, weights.astype(unit.dtype), smoothing / unit / unit / unit)

    return in_float64(jax.jit(form_from_places))


_form_matrix, _form_blocks = _compile_in_float64(form_matrix), _compile_in_float64(form_blocks)


def _interleave_in_program(knots, points, block_size) -> Interleaving:
    with double_precision():
        knots, points = (jax.lax.stop_gradient(jnp.asarray(a).astype(jnp.float64)) for a in (knots, points))
        return interleave(knots, points, block_size)
