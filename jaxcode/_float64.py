"""Runs small computations in float64 inside programs of any precision."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero


def x64_is_on() -> bool:
    """Returns whether JAX's x64 mode is on in this thread."""
    return jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]


def in_float64(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function so that it and its derivatives are computed in float64, whether JAX's x64 mode is on or off.

    `jax.enable_x64(True)` around the body is enough for values and forward derivatives. A reverse derivative is traced
    later, outside the body, where with x64 off the transposes of gather and dot ask for float64 and are given
    float32. So when the function is differentiated, both directions of the derivative are traced inside the body.

    Strict promotion of dtypes and ranks and guards against transfers to the device, where the caller has asked for
    them, do not hold inside the function.

    Args:
        function: Pure, of positional arguments that are pytrees of arrays. Inexact ones narrower than float64 are
            widened. It must not call what JAX expands only when it lowers a program, when x64 is off again: `argmin`
            and `argmax` fail. `dtype=jnp.float64` is safe only outside of what is mapped by `vmap`.

    Returns:
        The function, with float64 results; jit, vmap, jvp, vjp, and forward over reverse, work as usual.
    """

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def call(structure, *leaves):
        return function(*jax.tree.unflatten(structure, leaves))

    @functools.partial(call.defjvp, symbolic_zeros=True)
    def jvp(structure, primals, tangents):
        with double_precision():
            indices = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero)]

            def partial_function(*arguments):
                """Computes the function from the leaves that have a tangent; the others are constant."""
                leaves = list(primals)
                for i, argument in zip(indices, arguments, strict=True):
                    leaves[i] = argument
                return function(*jax.tree.unflatten(structure, leaves))

            point = tuple(primals[i] for i in indices)
            tangent_out = _apply_linear_map(
                forward=lambda tangent: jax.jvp(partial_function, point, tangent)[1],
                transpose=lambda cotangent: jax.vjp(partial_function, *point)[1](cotangent),
                argument=tuple(tangents[i] for i in indices),
                result_shape=jax.eval_shape(partial_function, *point),
                parameters=[leaf for leaf in primals if jnp.issubdtype(leaf.dtype, jnp.inexact)],
            )
            return call(structure, *primals), tangent_out

    @functools.wraps(function)
    def wrapped(*args):
        with double_precision():
            leaves, structure = jax.tree.flatten(args)
            return call(structure, *(_widen(leaf) for leaf in leaves))

    return wrapped


def constant_in_float64(function: Callable[..., Any], *arguments: Any) -> Any:
    """Computes a function's value in float64 whether JAX's x64 mode is on or off, as a constant to derivatives.

    Args:
        function: Of arrays, to a pytree of arrays; traced.
        arguments: Arrays; inexact ones narrower than float64 are widened.

    Returns:
        The value, real numbers in float64 with x64 on, else float32. Under `vmap` elements are computed sequentially:
        operations that are batched after tracing get float32 instead of float64, and batched LAPACK factorizations
        that run concurrently can deadlock on a CPU of few cores.
    """
    result_dtype = jnp.result_type(float)
    # NumPy arrays are constants of the program, because with x64 off they would be rounded as arguments are.
    static = {i: argument for i, argument in enumerate(arguments) if isinstance(argument, np.ndarray)}

    @jax.custom_batching.sequential_vmap
    def compute(*traced):
        with double_precision():
            traced_arguments = iter(traced)
            widened = [_widen(static[i] if i in static else next(traced_arguments)) for i in range(len(arguments))]

            def narrow(leaf):
                return leaf.astype(result_dtype) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

            return jax.tree.map(narrow, function(*widened))

    return compute(*jax.lax.stop_gradient([argument for i, argument in enumerate(arguments) if i not in static]))


@contextlib.contextmanager
def double_precision():
    """Turns x64 mode on, and strict promotion and transfer guards off, which are meant for the caller's code."""
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        # Nodes in NumPy are implicitly transferred to the program.
        jax.transfer_guard_host_to_device("allow"),
    ):
        yield


def _widen(value):
    # A copy, because JAX remembers by identity how it converted a NumPy array, whatever x64 mode it was in: the same
    # array given to a jitted function later, with x64 off, would come in as float64 where the program expects
    # float32.
    array = jnp.asarray(np.array(value) if isinstance(value, np.ndarray) else value)
    return array.astype(jnp.float64) if jnp.issubdtype(array.dtype, jnp.inexact) else array


def _apply_linear_map(forward, transpose, argument, result_shape, parameters):
    """Applies a linear map J whose forward and transposed products are both given; both are traced by this call.

    It is written as a linear solve, because `jax.lax.custom_linear_solve` is the only primitive of JAX that takes both
    directions of a linear map and is differentiated, transposed and batched with them. J x is the part v of the
    solution of

        [  1  0 ] [ u ]   [ x ]
        [ -J  1 ] [ v ] = [ 0 ].

    Args:
        forward: From x to J x.
        transpose: From y to J^T y.
        argument: x, a pytree.
        result_shape: Shapes and dtypes of J x.
        parameters: Inexact arrays on which J depends.
    """

    # JAX transposes a solve only if its whole right-hand side depends on x, and differentiates one only if the whole
    # right-hand side has a tangent or the matrix has. So a zero that depends on x is added to the right-hand side of
    # v, and the matrix's ones depend on the parameters. Each such zero is a sum of no entries, so that no
    # NaN of the arrays reaches it.
    def zero_depending_on(tree):
        return sum(jnp.sum(leaf.ravel()[:0]) for leaf in jax.tree.leaves(tree))

    def add(x, y):
        return jax.tree.map(jnp.add, x, y)

    def negate(x):
        return jax.tree.map(jnp.negative, x)

    def multiply(vector):
        u, v = vector
        return jax.tree.map(lambda leaf: one * leaf, (u, add(v, negate(forward(u)))))

    def solve(_, vector):
        u, v = vector
        return u, add(v, forward(u))

    def solve_transposed(_, vector):
        u, v = vector
        return add(u, transpose(v)), v

    one = 1 + zero_depending_on(parameters)
    zero = zero_depending_on(argument)
    u_side = jax.tree.map(lambda leaf: leaf + zero, argument)
    v_side = jax.tree.map(lambda shape: jnp.broadcast_to(zero, shape.shape), result_shape)
    u, v = jax.lax.custom_linear_solve(multiply, (u_side, v_side), solve, solve_transposed)
    return jax.tree.map(lambda leaf: leaf + zero_depending_on(u), v)
