"""Computes the work of one machine in a process of its own, as a Ray actor."""

import functools
from collections.abc import Callable
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from ..pools.compute import unpack
from . import _rounds
from .state import Common, Machine

# Called with a machine's number and its work of a round, a function of no arguments; returns the work's results.
Interceptor = Callable[[int, Callable[[], Any]], Any]


@final
class MachineActor:
    """Computes the work of one machine on its samples, and keeps its local state and message.

    All methods return a value, None where there is none, and the machine's message. They raise `FloatingPointError` if
    numbers are not finite; local state and message are then what they were.

    Args:
        number: Index of the machine.
        method: What it computes.
        params: Parameters as `pack` returns them, of which only the structure and shapes matter.
        num_samples: n, the samples of all machines.
        interceptor: See `Interceptor`; None to work without it.
        x64: Whether JAX computes in 64 bits.
        samples: Its samples, leaves (m, ...).
        size: How many of them are samples; the rest are padding.
    """

    def __init__(self, number, method, params, num_samples, interceptor, x64, samples, size):
        jax.config.update("jax_enable_x64", x64)
        _, unravel = ravel_pytree(unpack(params))
        samples, size = jax.tree.map(jnp.asarray, samples), jnp.asarray(size)

        def make_machine(message, local, dtype):
            return Machine(message, local, samples, size, jnp.ones((), dtype))

        def begin(w, step_size):
            common = Common(w, None, step_size, jnp.zeros((), jnp.int32), unravel, num_samples)
            return _rounds.cast(method, w.dtype).begin(common, make_machine(None, None, w.dtype))

        def work(message_sum, w, step_size, round_number, key, message, local):
            common = Common(w, message_sum, step_size, round_number, unravel, num_samples)
            machine_key = jax.random.fold_in(jax.random.fold_in(key, round_number), number)
            return _rounds.cast(method, w.dtype).work(common, make_machine(message, local, w.dtype), machine_key)

        self._begin, self._work = jax.jit(begin), jax.jit(work)
        self._compute = (lambda compute: compute()) if interceptor is None else functools.partial(interceptor, number)

    def begin(self, w, step_size):
        """Sets the first local state and message, those of the given parameters; the value is None."""
        return self._store(None, *self._begin(w, step_size))

    def work(self, message_sum, w, step_size, round_number, key):
        """Computes its part of a round; the value is its update of the parameters."""
        args = message_sum, w, step_size, jnp.asarray(round_number, jnp.int32), unpack(key)
        return self._store(*self._compute(lambda: self._work(*args, self._message, self._local)))

    def local(self):
        """Returns its local state as the value."""
        return jax.tree.map(np.asarray, self._local), np.asarray(self._message)

    def restore(self, local, message):
        """Continues from a local state and message of a checkpoint; the value is None."""
        return self._store(None, jax.tree.map(jnp.asarray, local), jnp.asarray(message))

    def _store(self, value, local, message):
        parts = [np.asarray(part) for part in jax.tree.leaves((value, local, message))]
        if not all(np.isfinite(part).all() for part in parts if jnp.issubdtype(part.dtype, jnp.floating)):
            raise FloatingPointError("its numbers are not finite")
        self._local, self._message = local, message
        return jax.tree.map(np.asarray, (value, message))
