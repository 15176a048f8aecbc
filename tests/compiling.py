"""Compiling programs that run a few times."""

import functools

import jax

# Most of their time is the compiler's, which unoptimised takes two thirds of it.
jit_in_haste = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
