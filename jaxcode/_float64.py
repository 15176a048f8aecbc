"""Small computations in float64 inside programs of any precision."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero


def x64_is_on() -> bool:
    """Whether JAX's x64 mode is on in this thread."""
    return jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def float64_mode() -> Iterator[None]:
    """Has JAX compute in float64 and with its own promotion rules, whatever the user's modes are."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def in_float64(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function compute in float64 whether JAX's x64 mode is on or off, and its derivatives too.

    `jax.enable_x64(True)` around the body is enough for values and forward derivatives. A reverse derivative is traced
    later, outside the body, where with x64 off the transposes of gather and dot ask for float64 and are given
    float32. So the derivative is taken inside, in both directions, when the function is differentiated at all.

    Args:
        function: Pure, of positional arguments that are pytrees of arrays. Inexact ones narrower than float64 are
            widened.

    Returns:
        The function, with float64 results; jit, vmap, jvp, vjp, and forward over reverse, work as usual.
    """

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def widened(structure, *leaves):
        return function(*jax.tree.unflatten(structure, leaves))

    @functools.partial(widened.defjvp, symbolic_zeros=True)
    def jvp(structure, primals, tangents):
        with float64_mode():
            moving = [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)]

            def of_moving(*moved):
                leaves = list(primals)
                for i, value in zip(moving, moved, strict=True):
                    leaves[i] = value
                return function(*jax.tree.unflatten(structure, leaves))

            at = tuple(primals[i] for i in moving)
            out = widened(structure, *primals)
            moves = tuple(tangents[i] for i in moving)
            return out, _linear(
                lambda t: jax.jvp(of_moving, at, t)[1],
                lambda ct: jax.vjp(of_moving, *at)[1](ct),
                moves,
                jax.eval_shape(of_moving, *at),
                [p for p in primals if jnp.issubdtype(p.dtype, jnp.inexact)],
            )

    @functools.wraps(function)
    def wrapped(*args):
        with float64_mode():
            leaves, structure = jax.tree.flatten(args)
            return widened(structure, *(_widen(leaf) for leaf in leaves))

    return wrapped


def constant_in_float64(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's value, computed in float64 whether JAX's x64 mode is on or off, as a constant to derivatives.

    Args:
        function: Of arrays, to a pytree of arrays; traced.
        arguments: Arrays; inexact ones narrower than float64 are widened.

    Returns:
        The value, real numbers in float64 with x64 on, else float32. Mapped with `vmap`, one after the other: what is
        batched after it has been traced is given float32 for float64, and batched factorizations of LAPACK's that run
        side by side can wait for each other forever on a CPU of few cores.
    """
    narrow = jnp.result_type(float)
    # As constants, for with x64 off they would be rounded as arguments are.
    known = {i: argument for i, argument in enumerate(arguments) if isinstance(argument, np.ndarray)}

    @jax.custom_batching.sequential_vmap
    def compute(*others):
        with float64_mode():
            rest = iter(others)
            every = [_widen(known[i] if i in known else next(rest)) for i in range(len(arguments))]
            found = function(*every)
            return jax.tree.map(lambda a: a.astype(narrow) if jnp.issubdtype(a.dtype, jnp.inexact) else a, found)

    return compute(*jax.lax.stop_gradient([argument for i, argument in enumerate(arguments) if i not in known]))


def _widen(value):
    # A copy, because JAX remembers by identity how it converted a NumPy array, whatever x64 mode it was in: the same
    # array given to a jitted function later, with x64 off, would come in as float64 where the program expects
    # float32.
    array = jnp.asarray(np.array(value) if isinstance(value, np.ndarray) else value)
    return array.astype(jnp.float64) if jnp.issubdtype(array.dtype, jnp.inexact) else array


def _linear(forward, transpose, argument, result_shape, depends_on):
    """Applies a linear map whose transpose is given and traced now.

    A linear solve is the one operation of JAX that carries both directions through every transformation: the map J is
    read off the solution of [[1, 0], [-J, 1]] (a, b) = (argument, 0).
    """

    # JAX transposes a solve only if all its right-hand side depends on the argument, and differentiates one only if all
    # of that side moves or the matrix does. Zeros see to it: sums of no entries, which no NaN reaches.
    def zero_of(tree):
        return sum(jnp.sum(leaf.ravel()[:0]) for leaf in jax.tree.leaves(tree))

    one = 1 + zero_of(depends_on)
    zero = zero_of(argument)
    zeros = jax.tree.map(lambda s: jnp.broadcast_to(zero, s.shape), result_shape)

    def add(x, y):
        return jax.tree.map(jnp.add, x, y)

    def negated(x):
        return jax.tree.map(jnp.negative, x)

    moved, result = jax.lax.custom_linear_solve(
        matvec=lambda v: jax.tree.map(lambda leaf: one * leaf, (v[0], add(v[1], negated(forward(v[0]))))),
        b=(jax.tree.map(lambda leaf: leaf + zero, argument), zeros),
        solve=lambda _, v: (v[0], add(v[1], forward(v[0]))),
        transpose_solve=lambda _, v: (add(v[0], transpose(v[1])), v[1]),
    )
    return jax.tree.map(lambda leaf: leaf + zero_of(moved), result)
