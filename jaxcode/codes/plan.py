"""Plans: what is decided about a group of inputs before it is encoded, and what its decoder reads of the inputs."""

from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._pytree import pytree


@final
@pytree(eq=False)
class Prior:
    """Holds a prior on f's answers, such as a cheap model's predictions of them.

    Attributes:
        workers: Prior means of the workers' answers, leaves (N, ...) like the answers.
        data: Prior means of the results, leaves (K, ...) like the results.
        errors: Expected error of each of these, root mean square over its numbers, in the unit of the results, (K,);
            None if unknown.
        worker_errors: The same of the workers' answers, (N,); None if unknown.
    """

    workers: PyTree[Array | np.ndarray]
    data: PyTree[Array | np.ndarray]
    errors: Float[Array | np.ndarray, "*groups data"] | None = None
    worker_errors: Float[Array | np.ndarray, "*groups workers"] | None = None

    def residuals(self, answers: PyTree[ArrayLike]) -> PyTree[Array]:
        """Subtracts the workers' means from their answers, in the answers' dtypes."""
        return jax.tree.map(lambda answer, mean: answer - jnp.asarray(mean, answer.dtype), answers, self.workers)

    def complete(
        self, decoded: PyTree[Array], recovered: Bool[Array | np.ndarray, "data *groups"], *, adds: bool
    ) -> PyTree[Array]:
        """Makes results of what was decoded.

        Args:
            decoded: Leaves (K, ...).
            recovered: Which results were decoded, over the leading axes of the leaves.
            adds: Whether residuals were decoded, to which the means are added.

        Returns:
            Leaves (K, ...); the means where results are not recovered.
        """
        recovered = jnp.asarray(recovered)

        def complete(result, mean):
            mean = jnp.asarray(mean, result.dtype)
            is_recovered = recovered.reshape(*recovered.shape, *[1] * (result.ndim - recovered.ndim))
            return jnp.where(is_recovered, result + mean if adds else result, mean)

        return jax.tree.map(complete, decoded, self.data)


@final
@pytree(eq=False)
class Plan:
    """Holds the context that a group's encoder and decoder share.

    Attributes:
        assignment: Which input each worker serves, int (N,), for codes that assign inputs to workers; the code's own
            assignment if None.
        prior: A prior on the answers: they are decoded relative to its means, and results that cannot be recovered are
            its means. None for no prior.
        features: Anything else that a code's operators read of the inputs, leaves (K, ...), such as the features of a
            kernel.
    """

    assignment: Int[Array | np.ndarray, "*groups workers"] | None = None
    prior: Prior | None = None
    features: PyTree[Array | np.ndarray] | None = None
