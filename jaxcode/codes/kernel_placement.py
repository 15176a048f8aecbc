"""Places a kernel code's redundant workers: at copies of inputs and at points between them."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._float64 import in_float64
from ..interpolants.kernel import JITTER, eliminate
from ..linops.dense import matmul

# Workers may compute points between an input and one of so many nearest others, at such a share of the way: of farther
# ones the model's answer says less about either. Points near an input stand for it almost as well as copies do, and
# tell more about others (`python -m models.sweeps`).
_NUM_NEIGHBOURS, _SHARES = 4, (0.25, 0.5)


@functools.cache
def compiled_placement(num_workers: int) -> Callable[..., tuple[Array, Array]]:
    """Returns the compiled function that places workers, from the group's features, weights, process and share of late.

    It returns pairs of inputs, int32 (N, 2), and shares, float32 (N,): worker n computes the point at that share of the
    way from the first to the second. How they are chosen is in the documentation of `KernelCode`.
    """

    def place(data, weight, process, late):
        num_data = data.shape[0]
        own = np.arange(num_data, dtype=np.int32)
        squares = jnp.sum((data[:, None] - data[None]) ** 2, axis=2)
        _, neighbours = jax.lax.top_k(-squares, min(num_data, _NUM_NEIGHBOURS + 1))
        # Each input is its own nearest neighbour.
        others = jnp.where(neighbours[:, :1] == own[:, None], neighbours[:, 1:], neighbours[:, :-1]).reshape(-1)
        num_pairs = len(others)
        firsts = np.concatenate([own, *[np.repeat(own, num_pairs // num_data)] * len(_SHARES)])
        seconds = jnp.concatenate([own, *[others] * len(_SHARES)])
        shares = np.concatenate([np.zeros(num_data), *(np.full(num_pairs, share) for share in _SHARES)])
        candidates = (1 - shares)[:, None] * data[firsts] + shares[:, None] * data[seconds]
        # Rows of Cholesky's factor of the candidates' covariance, first for the inputs and then for the workers chosen.
        covariance = process.correlation(squares) + JITTER * jnp.eye(num_data)
        cross = process.correlation(jnp.sum((data[:, None] - candidates[None]) ** 2, axis=2))
        _, half = eliminate(covariance, jnp.concatenate([jnp.eye(num_data), cross], axis=1))
        inverse_factor, rows = half[:, :num_data], half[:, num_data:]
        gains = matmul(inverse_factor.T, rows)
        remaining = 1 + JITTER - jnp.sum(rows**2, axis=0)
        index = jnp.arange(len(firsts), dtype=jnp.int32)
        odds = late / jnp.maximum(1 - late, 1e-3)

        def add_worker(state, step):
            precision, gains, remaining, chosen_rows = state
            scale = jnp.maximum(remaining, JITTER)
            variance = 1 / (precision[:, None] + gains**2 / scale[None])
            cost = jnp.sum(weight[:, None] * ((1 - late) * variance + late / precision[:, None]), axis=0)
            cost = jnp.where(jnp.isnan(cost), jnp.inf, cost)
            best = jnp.min(jnp.where(cost == jnp.min(cost), index, len(firsts) - 1))
            prior = process.correlation(jnp.sum((candidates - candidates[best]) ** 2, axis=1))
            covariances = prior - _weigh(rows[:, best], rows) - _weigh(chosen_rows[:, best], chosen_rows)
            covariances = covariances.at[best].add(JITTER)
            gain = gains[:, best]
            # A worker that may be late tells as much as one whose answer has noise.
            noise = odds * (scale[best] + jnp.max(gain**2 / precision))
            new_scale = scale[best] + noise
            precision = precision + gain**2 / new_scale
            gains = gains - gain[:, None] * covariances[None] / new_scale
            remaining = remaining - covariances**2 / new_scale
            chosen_rows = chosen_rows.at[step].set(covariances / jnp.sqrt(new_scale))
            return (precision, gains, remaining, chosen_rows), best

        steps = jnp.arange(num_workers - num_data, dtype=jnp.int32)
        chosen_rows = jnp.zeros((max(1, num_workers - num_data), len(firsts))) * remaining[:1]
        state = jnp.sum(inverse_factor**2, axis=0), gains, remaining, chosen_rows
        _, best = jax.lax.scan(add_worker, state, steps)
        chosen = jnp.concatenate([own, best]).astype(jnp.int32)
        pairs = jnp.stack([jnp.asarray(firsts)[chosen], seconds[chosen]], axis=1).astype(jnp.int32)
        return pairs, jnp.asarray(shares, jnp.float32)[chosen]

    return in_float64(jax.jit(place))


def _weigh(weights, rows):
    """Computes the weighted sum of rows."""
    return jnp.sum(weights[:, None] * rows, axis=0)
