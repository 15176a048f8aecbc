"""Draws the latencies of workers."""

import abc
import math
from collections.abc import Sequence
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray, Real

from .._arrays import as_float
from .._pytree import pytree
from ..checks import check_count, check_durations, check_not_negative, check_positive


class AbstractLatency(abc.ABC):
    """Draws the latency of each worker, the seconds that it takes to answer.

    Latencies have JAX's default floating dtype (float32, or float64 when x64 is enabled), whatever the dtype of the
    parameters. A latency of `inf` is a worker that never answers. Draws come from `jax.random`, whose float32 uniforms
    have steps of 2^-23: quantiles beyond about 1 - 1e-7 need x64.
    """

    @abc.abstractmethod
    def sample(self, key: PRNGKeyArray, num_workers: int) -> Float[Array, "workers"]:
        """Draws one latency per worker.

        Args:
            key: The random key, typed or legacy.
            num_workers: N, static.

        Returns:
            Seconds, shape (N,), default floating dtype.

        Raises:
            ValueError: If num_workers is not an integer of at least 1.
        """


@final
@pytree()
class ShiftedExponential(AbstractLatency):
    r"""Draws latencies that are a fixed time plus an exponential one, independent across workers.

    .. math:: P(T > t) = \exp\left(-\frac{t - \text{shift}}{\text{scale}}\right), \qquad t \ge \text{shift}

    Mean shift + scale, standard deviation scale. The usual model of coded computing: shift is the time of the
    computation itself, scale the mean delay that the machine adds.

    Attributes:
        shift: Seconds every answer takes at least; finite, not negative. A leaf.
        scale: Mean of the exponential part in seconds; finite, positive. A leaf.

    Raises:
        ValueError: If a parameter is outside its range.

    References:
        Lee et al., Speeding Up Distributed Machine Learning Using Codes, arXiv 1512.02673.

    >>> seconds = ShiftedExponential(shift=0.1, scale=0.02).sample(jax.random.key(0), num_workers=1000)
    >>> bool(seconds.min() >= 0.1), round(float(seconds.mean()), 2)
    (True, 0.12)
    """

    shift: Real[ArrayLike, ""]
    scale: Real[ArrayLike, ""]

    def __post_init__(self):
        check_not_negative("shift", self.shift, "give seconds, 0 for none")
        check_positive("scale", self.scale, "give the mean wait in seconds, e.g. 0.02")

    def sample(self, key: PRNGKeyArray, num_workers: int) -> Float[Array, "workers"]:
        check_count("num_workers", num_workers)
        excess = jax.random.exponential(key, (num_workers,))
        return as_float(self.shift) + as_float(self.scale) * excess


@final
@pytree()
class Pareto(AbstractLatency):
    r"""Draws latencies with a heavy tail, independent across workers: a few are slower by orders of magnitude.

    .. math:: P(T > t) = \left(\frac{\text{minimum}}{t}\right)^{\text{shape}}, \qquad t \ge \text{minimum}

    The mean is infinite for shape <= 1 and the variance for shape <= 2.

    Attributes:
        minimum: Seconds every answer takes at least; finite, positive. A leaf.
        shape: The tail index, without unit; finite, positive, smaller is heavier. A leaf.

    Raises:
        ValueError: If a parameter is outside its range.

    >>> seconds = Pareto(minimum=0.1, shape=2.0).sample(jax.random.key(0), num_workers=1000)
    >>> bool(seconds.min() >= 0.1), round(float(jnp.median(seconds)), 2)
    (True, 0.14)
    """

    minimum: Real[ArrayLike, ""]
    shape: Real[ArrayLike, ""]

    def __post_init__(self):
        check_positive("minimum", self.minimum, "give the shortest latency in seconds, e.g. 0.1")
        check_positive("shape", self.shape, "give the tail index, e.g. 2.0")

    def sample(self, key: PRNGKeyArray, num_workers: int) -> Float[Array, "workers"]:
        check_count("num_workers", num_workers)
        log_ratio = jax.random.exponential(key, (num_workers,)) / as_float(self.shape)
        return as_float(self.minimum) * jnp.exp(log_ratio)


@final
@pytree()
class LogNormal(AbstractLatency):
    r"""Draws latencies whose logarithm is normal, independent across workers.

    .. math:: T = \text{median} \cdot e^{\sigma Z}, \qquad Z \sim \mathcal{N}(0, 1)

    The mean is median * exp(sigma^2 / 2).

    Attributes:
        median: Seconds that half of the answers take at most; finite, positive. A leaf.
        sigma: Standard deviation of the natural logarithm of the latency, without unit; finite, not negative, 0
            for workers that all take the median. A leaf.

    Raises:
        ValueError: If a parameter is outside its range.

    >>> seconds = LogNormal(median=0.1, sigma=0.5).sample(jax.random.key(0), num_workers=1000)
    >>> round(float(jnp.median(seconds)), 2)
    0.1
    """

    median: Real[ArrayLike, ""]
    sigma: Real[ArrayLike, ""]

    def __post_init__(self):
        check_positive("median", self.median, "give the median latency in seconds, e.g. 0.1")
        check_not_negative("sigma", self.sigma, "give the spread of its logarithm, 0 for none")

    def sample(self, key: PRNGKeyArray, num_workers: int) -> Float[Array, "workers"]:
        check_count("num_workers", num_workers)
        spread = as_float(self.sigma) * jax.random.normal(key, (num_workers,))
        return as_float(self.median) * jnp.exp(spread)


@final
@pytree(eq=False)
class Empirical(AbstractLatency):
    r"""Draws measured latencies with replacement, one for each worker (the bootstrap).

    .. math:: P(T \le t) = \frac{1}{n} \left|\{i : \text{samples}_i \le t\}\right|

    Two of these are equal only if they are the same object.

    Attributes:
        samples: Seconds, shape (n,) with n >= 1, not negative, no NaN; `inf` for a call that was never answered. A
            sequence or NumPy array is copied to a NumPy float64 array. A leaf.

    Raises:
        ValueError: If samples is not one-dimensional, is empty, or holds a NaN or a negative number.

    >>> seconds = Empirical([0.1, 0.1, 2.5]).sample(jax.random.key(0), num_workers=1000)
    >>> jnp.unique(seconds).tolist() == jnp.asarray([0.1, 2.5]).tolist()
    True
    """

    samples: Real[ArrayLike, "draws"] | Sequence[float]

    def __post_init__(self):
        if not isinstance(self.samples, jax.Array):
            try:
                samples = np.array(self.samples, np.float64)
            except (TypeError, ValueError):
                raise ValueError(f"samples is {self.samples!r}; expected numbers: give latencies in seconds") from None
            object.__setattr__(self, "samples", samples)
        check_durations("samples", self.samples)

    def sample(self, key: PRNGKeyArray, num_workers: int) -> Float[Array, "workers"]:
        check_count("num_workers", num_workers)
        return _choice(key, as_float(self.samples), (num_workers,))


@final
@pytree("workers_per_host")
class CorrelatedByHost(AbstractLatency):
    r"""Draws latencies that are correlated among the workers of one host.

    .. math:: T_n = A_n + B_{\lfloor n / w \rfloor}, \qquad n = 0, \ldots, N - 1

    with A drawn from `latency` for each worker, B from `host_latency` for each host, independently, and w
    `workers_per_host`. Hosts are consecutive runs of workers; the last may be short. If both models draw independently
    and with finite variance, the latencies of two workers of one host have correlation Var B / (Var A + Var B), those
    of other pairs 0.

    Attributes:
        latency: Draws the part of each worker.
        host_latency: Draws the part of each host; a `CorrelatedByHost` of its own puts hosts into racks.
        workers_per_host: w, an integer of at least 1. Static: it fixes how many hosts are drawn.

    Raises:
        ValueError: If workers_per_host is not an integer of at least 1.

    >>> worker, host = LogNormal(0.1, sigma=0.0), ShiftedExponential(0.0, scale=1.0)
    >>> seconds = CorrelatedByHost(worker, host, workers_per_host=2).sample(jax.random.key(0), num_workers=5)
    >>> len(set(seconds.tolist())), bool(seconds[0] == seconds[1])
    (3, True)
    """

    latency: AbstractLatency
    host_latency: AbstractLatency
    workers_per_host: int

    def __post_init__(self):
        check_count("workers_per_host", self.workers_per_host)

    def sample(self, key: PRNGKeyArray, num_workers: int) -> Float[Array, "workers"]:
        check_count("num_workers", num_workers)
        worker_key, host_key = jax.random.split(key)
        host_seconds = self.host_latency.sample(host_key, math.ceil(num_workers / self.workers_per_host))
        worker_seconds = self.latency.sample(worker_key, num_workers)
        host_of_worker = jax.device_put(np.arange(num_workers, dtype=np.int32) // self.workers_per_host)
        return worker_seconds + jnp.take(host_seconds, host_of_worker)


# Jitted as a whole, since evaluated eagerly it would transfer its constants implicitly.
_choice = jax.jit(jax.random.choice, static_argnums=2)
