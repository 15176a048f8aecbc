"""Replication: some workers compute each input, unmixed."""

from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int, PyTree

from .._pytree import pytree
from ..checks import check_count, check_mask, static_value
from ..linops import AbstractLinop, Gather
from .abstract import AbstractCode
from .plan import Plan


@final
@pytree("num_data", "num_workers")
class ReplicationCode(AbstractCode):
    """Has worker n compute input n mod K; the first copy that returned is the result.

    An input of which no copy returned is lost. Nothing is mixed, so inputs and answers may have any dtype and keep it.
    A plan may assign inputs to workers in another way.

    Attributes:
        num_data: K >= 1.
        num_workers: N >= K.

    Raises:
        ValueError: If the numbers are not whole, or N < K.

    >>> code = ReplicationCode(num_data=2, num_workers=5)
    >>> code.encode(jnp.array([1.0, 2.0]))
    Array([1., 2., 1., 2., 1.], dtype=float32)
    >>> code.decode(code.encode(jnp.array([1.0, 2.0])), jnp.array([False, False, True, False, True]))
    Array([ 1., nan], dtype=float32)
    """

    num_data: int
    num_workers: int
    nodes = None
    predicts_error = True
    assigns = True
    inputs_first = True

    def __post_init__(self):
        num_data = check_count("num_data", self.num_data)
        if check_count("num_workers", self.num_workers) < num_data:
            raise ValueError(f"num_workers is {self.num_workers}; expected at least num_data, {num_data}")

    def encoder_linop(self, plan: Plan | None = None) -> AbstractLinop:
        return Gather(self.assignment(plan), self.num_data)

    def decoder_linop(self, returned: Bool[ArrayLike, "workers"], plan: Plan | None = None) -> AbstractLinop:
        first = self._first_copies(returned, plan)
        # `first` is out of range where no copy returned.
        index = first.clip(0, self.num_workers - 1)
        return Gather(index, self.num_workers, defined=first < self.num_workers)

    def recovered(
        self, returned: Bool[ArrayLike, "workers"], plan: Plan | None = None
    ) -> Bool[Array | np.ndarray, "data"]:
        return self._first_copies(returned, plan) < self.num_workers

    def exact(self, returned: Bool[ArrayLike, "workers"], plan: Plan | None = None) -> Bool[Array | np.ndarray, "data"]:
        return self.recovered(returned, plan)

    def decode_with_error(
        self, y: PyTree[ArrayLike], returned: Bool[ArrayLike, "workers"], plan: Plan | None = None
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """Decodes, and predicts the errors of the results.

        Args:
            y: As for `decode`.
            returned: As for `decode`.
            plan: As for `decode`.

        Returns:
            The results, and leaves like them of standard errors in float32 or wider: zero where a copy returned, for
            others those of the prior, which are infinite without one.

        Raises:
            ValueError: As for `decode`.

        >>> code = ReplicationCode(num_data=2, num_workers=3)
        >>> code.decode_with_error(jnp.array([1.0, 2.0, 1.0]), jnp.array([False, False, True]))[1]
        Array([ 0., inf], dtype=float32)
        """
        results = self.decode(y, returned, plan)
        errors = None if plan is None or plan.prior is None else plan.prior.errors
        errors = jnp.full(self.num_data, jnp.inf) if errors is None else jnp.asarray(errors)
        errors = jnp.where(jnp.asarray(self.recovered(returned, plan)), 0, errors)

        def spread(result):
            rows = errors.astype(jnp.promote_types(result.dtype, jnp.float32))
            return jnp.broadcast_to(rows.reshape(-1, *[1] * (result.ndim - 1)), result.shape)

        return results, jax.tree.map(spread, results)

    def assignment(self, plan: Plan | None = None) -> Int[Array | np.ndarray, "workers"]:
        """Returns which input each worker computes, int32 (N,).

        Raises:
            ValueError: If a plan's assignment is not whole numbers (N,) from 0 to K - 1.
        """
        if plan is None or plan.assignment is None:
            return np.arange(self.num_workers, dtype=np.int32) % self.num_data
        assignment = plan.assignment
        if np.shape(assignment) != (self.num_workers,) or not jnp.issubdtype(assignment.dtype, jnp.integer):
            raise ValueError(
                f"plan.assignment has shape {np.shape(assignment)} and dtype {assignment.dtype}; expected the number "
                f"of an input for each worker, whole numbers of shape ({self.num_workers},)"
            )
        static = static_value(assignment)
        if static is None:
            return assignment.astype(jnp.int32)
        if static.min() < 0 or static.max() >= self.num_data:
            raise ValueError(f"plan.assignment is {static}; expected numbers of inputs, from 0 to {self.num_data - 1}")
        return static.astype(np.int32)

    def _first_copies(self, returned, plan):
        """Returns the first worker that returned each input, int32 (K,); N where none did."""
        check_mask("returned", returned, self.num_workers)
        assignment, mask = self.assignment(plan), static_value(returned)
        if isinstance(assignment, np.ndarray) and mask is not None:
            first = np.full(self.num_data, self.num_workers, np.int32)
            np.minimum.at(first, assignment[mask], np.flatnonzero(mask).astype(np.int32))
            return first
        worker = jnp.arange(self.num_workers, dtype=jnp.int32)
        returned_worker = jnp.where(jnp.asarray(returned), worker, self.num_workers)
        return jnp.full(self.num_data, self.num_workers, jnp.int32).at[jnp.asarray(assignment)].min(returned_worker)


def UncodedCode(num_data: int) -> ReplicationCode:
    """Constructs the code with one worker for each input, all of which are needed.

    Args:
        num_data: K >= 1; N is equal to it.

    Returns:
        The code.

    Raises:
        ValueError: If the number is not whole, or below 1.

    >>> UncodedCode(num_data=2).decode(jnp.array([1.0, 2.0]), jnp.array([False, True]))
    Array([nan,  2.], dtype=float32)
    """
    return ReplicationCode(num_data, num_data)
