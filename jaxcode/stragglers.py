"""Who is late: sets of stragglers and latency models, sampled under jit.

A straggler model draws a mask over the workers, ``True`` where the worker's answer returned. Some models draw
the set itself (:class:`Uniform`, :class:`Independent`); others draw how long every worker takes, in seconds,
and stop waiting by a rule (:class:`FirstToAnswer`, :class:`Deadline`).

Every model is a frozen dataclass and a pytree. Its parameters are leaves, so they may be traced, batched with
``jax.vmap`` and, for latencies, differentiated; only what fixes a shape is static. Arguments are checked when
their values are known, and taken on trust when they are traced. Nothing is shared between calls but the key:
the same key gives the same draw.
"""

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray, Real

from ._pytree import pytree


class AbstractStragglers(abc.ABC):
    """Draws which workers return."""

    @abc.abstractmethod
    def sample(self, key: PRNGKeyArray, num_workers: int) -> Bool[Array, "workers"]:
        """Draws one mask.

        Args:
            key: the random key, typed or legacy.
            num_workers: N, static.

        Returns:
            Bool, shape ``(num_workers,)``: ``True`` where the worker's answer returned.

        Raises:
            ValueError: if ``num_workers`` is not an integer of at least 1, or if the model asks for more
                workers than there are.
        """


class AbstractLatency(abc.ABC):
    """Draws how long each worker takes to answer.

    Latencies have JAX's default floating dtype (float32, or float64 when x64 is enabled), whatever the dtype
    of the parameters. A latency of ``inf`` is a worker that never answers. Draws come from ``jax.random``,
    whose float32 uniforms have steps of 2^-23: quantiles beyond about ``1 - 1e-7`` need x64.
    """

    @abc.abstractmethod
    def sample(self, key: PRNGKeyArray, num_workers: int) -> Float[Array, "workers"]:
        """Draws one latency per worker.

        Args:
            key: the random key, typed or legacy.
            num_workers: N, static.

        Returns:
            Seconds, shape ``(num_workers,)``, default floating dtype.

        Raises:
            ValueError: if ``num_workers`` is not an integer of at least 1.
        """


@final
@pytree()
class Uniform(AbstractStragglers):
    r"""Exactly S stragglers, every set of S equally likely.

    .. math:: P(\mathcal{S}) = \binom{N}{S}^{-1}, \qquad |\mathcal{S}| = S

    The straggler sets of the experiments in the reference.

    Attributes:
        num_stragglers: S, an integer, ``0 <= S <= num_workers``. A leaf: a traced S does not recompile.

    Raises:
        ValueError: if ``num_stragglers`` is not an integer or is negative, or, in :meth:`sample`, if it
            exceeds ``num_workers``.

    References:
        Moradi, Tahmasebi and Maddah-Ali, Coded Computing for Resilient Distributed Computing: A
        Learning-Theoretic Framework, arXiv 2406.00300.

    >>> returned = Uniform(num_stragglers=5).sample(jax.random.key(0), num_workers=30)
    >>> returned.shape, int(returned.sum())
    ((30,), 25)
    """

    num_stragglers: Integer[ArrayLike, ""]

    def __post_init__(self):
        _check_count("num_stragglers", self.num_stragglers, at_least=0)

    def sample(self, key: PRNGKeyArray, num_workers: int) -> Bool[Array, "workers"]:
        """Draws one mask; see :meth:`AbstractStragglers.sample`."""
        _check_size("num_workers", num_workers)
        _check_at_most("num_stragglers", self.num_stragglers, num_workers)
        return jax.random.permutation(key, num_workers) >= jnp.asarray(self.num_stragglers, int)


@final
@pytree()
class Independent(AbstractStragglers):
    r"""Every worker straggles with probability p, independently of the others.

    .. math:: P(\mathcal{S}) = p^{|\mathcal{S}|} (1 - p)^{N - |\mathcal{S}|}

    Any number of workers may return, none included.

    Attributes:
        probability: p in [0, 1], the chance that one worker does **not** return; drawn in steps of 2^-23
            unless x64 is enabled. A leaf.

    Raises:
        ValueError: if ``probability`` is not a number in [0, 1].

    References:
        arXiv 2502.00645 bounds the error of coded computing under these stragglers.

    >>> Independent(probability=0.0).sample(jax.random.key(0), num_workers=4)
    Array([ True,  True,  True,  True], dtype=bool)
    """

    probability: Real[ArrayLike, ""]

    def __post_init__(self):
        remedy = "give the chance that one worker straggles, e.g. 0.1"
        _check_number("probability", self.probability, lambda p: 0 <= p <= 1, "in [0, 1]", remedy)

    def sample(self, key: PRNGKeyArray, num_workers: int) -> Bool[Array, "workers"]:
        """Draws one mask; see :meth:`AbstractStragglers.sample`."""
        _check_size("num_workers", num_workers)
        return ~jax.random.bernoulli(key, jnp.asarray(self.probability, float), (num_workers,))


@final
@pytree()
class FirstToAnswer(AbstractStragglers):
    """The first workers to answer return; the others are not waited for.

    The mask describes the draw ``latency.sample(key, num_workers)`` of the same key: the ``num_answers``
    shortest of it. Ties are broken at random, so a coarse clock favours no worker. A worker whose latency is
    ``inf`` or NaN never returns, so fewer than ``num_answers`` return if fewer are alive.

    Attributes:
        latency: how long workers take.
        num_answers: how many answers to wait for, usually N - S; an integer, ``1 <= num_answers <=
            num_workers``. A leaf: a traced ``num_answers`` does not recompile.

    Raises:
        ValueError: if ``num_answers`` is not an integer or is below 1, or, in :meth:`sample`, if it exceeds
            ``num_workers``.

    >>> latency = Empirical([0.1, 0.1, 0.2])
    >>> int(FirstToAnswer(latency, num_answers=25).sample(jax.random.key(0), num_workers=30).sum())
    25
    """

    latency: AbstractLatency
    num_answers: Integer[ArrayLike, ""]

    def __post_init__(self):
        _check_count("num_answers", self.num_answers, at_least=1)

    def sample(self, key: PRNGKeyArray, num_workers: int) -> Bool[Array, "workers"]:
        """Draws one mask; see :meth:`AbstractStragglers.sample`."""
        _check_size("num_workers", num_workers)
        _check_at_most("num_answers", self.num_answers, num_workers)
        seconds = self.latency.sample(key, num_workers)
        # Folded in rather than split off, so that the latencies are those the caller draws with this key.
        lot = jax.random.permutation(jax.random.fold_in(key, 1), num_workers)
        rank = jnp.argsort(jnp.lexsort((lot, seconds)))
        return (rank < jnp.asarray(self.num_answers, int)) & (seconds < jnp.inf)


@final
@pytree()
class Deadline(AbstractStragglers):
    """Whoever answers by the deadline returns, the deadline itself included.

    The mask describes the draw ``latency.sample(key, num_workers)`` of the same key. Any number of workers
    may return, none included. A latency of ``inf`` or NaN meets no deadline.

    Attributes:
        latency: how long workers take.
        seconds: the deadline, positive; ``inf`` waits for every worker that ever answers. A leaf.

    Raises:
        ValueError: if ``seconds`` is not a positive number.

    >>> latency = ShiftedExponential(shift=0.1, scale=0.02)
    >>> Deadline(latency, seconds=0.09).sample(jax.random.key(0), num_workers=3)
    Array([False, False, False], dtype=bool)
    """

    latency: AbstractLatency
    seconds: Real[ArrayLike, ""]

    def __post_init__(self):
        remedy = "give the longest wait in seconds, e.g. 0.2"
        _check_number("seconds", self.seconds, lambda seconds: seconds > 0, "in (0, inf]", remedy)

    def sample(self, key: PRNGKeyArray, num_workers: int) -> Bool[Array, "workers"]:
        """Draws one mask; see :meth:`AbstractStragglers.sample`."""
        seconds = self.latency.sample(key, num_workers)
        return (seconds <= jnp.asarray(self.seconds, float)) & (seconds < jnp.inf)


@final
@pytree()
class ShiftedExponential(AbstractLatency):
    r"""A fixed time and then an exponential one, independent across workers.

    .. math:: P(T > t) = \exp\left(-\frac{t - \text{shift}}{\text{scale}}\right), \qquad t \ge \text{shift}

    Mean ``shift + scale``, standard deviation ``scale``. The usual model of coded computing: ``shift`` is the
    work itself, ``scale`` what the machine adds.

    Attributes:
        shift: seconds every answer takes at least; finite, not negative. A leaf.
        scale: mean of the exponential part in seconds; finite, positive. A leaf.

    Raises:
        ValueError: if a parameter is outside its range.

    References:
        Lee et al., Speeding Up Distributed Machine Learning Using Codes, arXiv 1512.02673.

    >>> seconds = ShiftedExponential(shift=0.1, scale=0.02).sample(jax.random.key(0), num_workers=1000)
    >>> bool(seconds.min() >= 0.1), round(float(seconds.mean()), 2)
    (True, 0.12)
    """

    shift: Real[ArrayLike, ""]
    scale: Real[ArrayLike, ""]

    def __post_init__(self):
        _check_not_negative("shift", self.shift, "give seconds, 0 for none")
        _check_positive("scale", self.scale, "give the mean wait in seconds, e.g. 0.02")

    def sample(self, key: PRNGKeyArray, num_workers: int) -> Float[Array, "workers"]:
        """Draws one latency per worker; see :meth:`AbstractLatency.sample`."""
        _check_size("num_workers", num_workers)
        excess = jax.random.exponential(key, (num_workers,))
        return jnp.asarray(self.shift, float) + jnp.asarray(self.scale, float) * excess


@final
@pytree()
class Pareto(AbstractLatency):
    r"""A heavy tail, independent across workers: a few are slower by orders of magnitude.

    .. math:: P(T > t) = \left(\frac{\text{minimum}}{t}\right)^{\text{shape}}, \qquad t \ge \text{minimum}

    The mean is infinite for ``shape <= 1`` and the variance for ``shape <= 2``.

    Attributes:
        minimum: seconds every answer takes at least; finite, positive. A leaf.
        shape: the tail index, without unit; finite, positive, smaller is heavier. A leaf.

    Raises:
        ValueError: if a parameter is outside its range.

    >>> seconds = Pareto(minimum=0.1, shape=2.0).sample(jax.random.key(0), num_workers=1000)
    >>> bool(seconds.min() >= 0.1), round(float(jnp.median(seconds)), 2)
    (True, 0.14)
    """

    minimum: Real[ArrayLike, ""]
    shape: Real[ArrayLike, ""]

    def __post_init__(self):
        _check_positive("minimum", self.minimum, "give the shortest latency in seconds, e.g. 0.1")
        _check_positive("shape", self.shape, "give the tail index, e.g. 2.0")

    def sample(self, key: PRNGKeyArray, num_workers: int) -> Float[Array, "workers"]:
        """Draws one latency per worker; see :meth:`AbstractLatency.sample`."""
        _check_size("num_workers", num_workers)
        log_ratio = jax.random.exponential(key, (num_workers,)) / jnp.asarray(self.shape, float)
        return jnp.asarray(self.minimum, float) * jnp.exp(log_ratio)


@final
@pytree()
class LogNormal(AbstractLatency):
    r"""A latency whose logarithm is normal, independent across workers.

    .. math:: T = \text{median} \cdot e^{\sigma Z}, \qquad Z \sim \mathcal{N}(0, 1)

    Mean ``median * exp(sigma**2 / 2)``.

    Attributes:
        median: seconds that half of the answers take at most; finite, positive. A leaf.
        sigma: standard deviation of the natural logarithm of the latency, without unit; finite, not negative,
            0 for workers that all take ``median``. A leaf.

    Raises:
        ValueError: if a parameter is outside its range.

    >>> seconds = LogNormal(median=0.1, sigma=0.5).sample(jax.random.key(0), num_workers=1000)
    >>> round(float(jnp.median(seconds)), 2)
    0.1
    """

    median: Real[ArrayLike, ""]
    sigma: Real[ArrayLike, ""]

    def __post_init__(self):
        _check_positive("median", self.median, "give the median latency in seconds, e.g. 0.1")
        _check_not_negative("sigma", self.sigma, "give the spread of its logarithm, 0 for none")

    def sample(self, key: PRNGKeyArray, num_workers: int) -> Float[Array, "workers"]:
        """Draws one latency per worker; see :meth:`AbstractLatency.sample`."""
        _check_size("num_workers", num_workers)
        spread = jnp.asarray(self.sigma, float) * jax.random.normal(key, (num_workers,))
        return jnp.asarray(self.median, float) * jnp.exp(spread)


@final
@pytree(eq=False)
class Empirical(AbstractLatency):
    r"""Latencies that were measured: every worker draws one of them, with replacement (the bootstrap).

    .. math:: P(T \le t) = \frac{1}{n} \left|\{i : \text{samples}_i \le t\}\right|

    Two of these are equal only if they are the same object, since arrays have no single truth value.

    Attributes:
        samples: seconds, shape ``(n,)`` with n >= 1, not negative, no NaN; ``inf`` for a call that was never
            answered. A sequence becomes a NumPy float64 array. A leaf.

    Raises:
        ValueError: if ``samples`` is not one-dimensional, is empty, or holds a NaN or a negative number.

    >>> seconds = Empirical([0.1, 0.1, 2.5]).sample(jax.random.key(0), num_workers=1000)
    >>> jnp.unique(seconds).tolist() == jnp.asarray([0.1, 2.5]).tolist()
    True
    """

    samples: Real[ArrayLike, "draws"] | Sequence[float]

    def __post_init__(self):
        if not isinstance(self.samples, jax.Array):
            object.__setattr__(self, "samples", np.asarray(self.samples, np.float64))
        _check_samples(self.samples)

    def sample(self, key: PRNGKeyArray, num_workers: int) -> Float[Array, "workers"]:
        """Draws one latency per worker; see :meth:`AbstractLatency.sample`."""
        _check_size("num_workers", num_workers)
        return jax.random.choice(key, jnp.asarray(self.samples, float), (num_workers,))


@final
@pytree("workers_per_host")
class CorrelatedByHost(AbstractLatency):
    r"""Workers that share a host share part of their latency.

    .. math:: T_n = A_n + B_{\lfloor n / w \rfloor}, \qquad n = 0, \ldots, N - 1

    with ``A`` drawn from ``latency`` for each worker, ``B`` from ``host_latency`` for each host,
    independently, and ``w = workers_per_host``. Hosts are consecutive runs of workers; the last may be short.
    If both models draw independently and with finite variance, the latencies of two workers of one host
    have correlation ``Var B / (Var A + Var B)``, those of other pairs 0.

    Attributes:
        latency: the worker's own part.
        host_latency: the host's part; a ``CorrelatedByHost`` here puts hosts into racks.
        workers_per_host: w, an integer of at least 1. Static: it fixes how many hosts are drawn.

    Raises:
        ValueError: if ``workers_per_host`` is not an integer of at least 1.

    >>> own, host = LogNormal(0.1, sigma=0.0), ShiftedExponential(0.0, scale=1.0)
    >>> seconds = CorrelatedByHost(own, host, workers_per_host=2).sample(jax.random.key(0), num_workers=5)
    >>> len(set(seconds.tolist())), bool(seconds[0] == seconds[1])
    (3, True)
    """

    latency: AbstractLatency
    host_latency: AbstractLatency
    workers_per_host: int

    def __post_init__(self):
        _check_size("workers_per_host", self.workers_per_host)

    def sample(self, key: PRNGKeyArray, num_workers: int) -> Float[Array, "workers"]:
        """Draws one latency per worker; see :meth:`AbstractLatency.sample`."""
        _check_size("num_workers", num_workers)
        own_key, host_key = jax.random.split(key)
        hosts = self.host_latency.sample(host_key, math.ceil(num_workers / self.workers_per_host))
        own = self.latency.sample(own_key, num_workers)
        return own + jnp.repeat(hosts, self.workers_per_host)[:num_workers]


def _check_number(
    name: str,
    value: Any,
    valid: Callable[[np.ndarray], Any],
    expected: str,
    remedy: str,
    integer: bool = False,
) -> None:
    """Refuses what is not a real scalar, or an integer one, or where its value is known is not valid."""
    dtype = value.dtype if isinstance(value, Tracer) else np.asarray(value).dtype
    # Asked of jnp, to which bfloat16 is a floating dtype.
    right = jnp.issubdtype(dtype, np.integer) or (not integer and jnp.issubdtype(dtype, np.floating))
    if not (right and np.ndim(value) == 0 and (isinstance(value, Tracer) or valid(np.asarray(value)))):
        noun = "an integer" if integer else "a number"
        raise ValueError(f"{name} must be {noun} {expected}, got {value!r}; {remedy}")


def _check_positive(name: str, value: Any, remedy: str) -> None:
    _check_number(name, value, lambda x: 0 < x < np.inf, "in (0, inf)", remedy)


def _check_not_negative(name: str, value: Any, remedy: str) -> None:
    _check_number(name, value, lambda x: 0 <= x < np.inf, "in [0, inf)", remedy)


def _check_count(name: str, value: Any, at_least: int) -> None:
    remedy = "give a whole number of workers"
    _check_number(name, value, lambda x: x >= at_least, f"of at least {at_least}", remedy, integer=True)


def _check_at_most(name: str, value: Any, num_workers: int) -> None:
    expected = f"of at most num_workers={num_workers}"
    remedy = f"ask for {num_workers} or fewer, or add workers"
    _check_number(name, value, lambda x: x <= num_workers, expected, remedy, integer=True)


def _check_size(name: str, value: Any) -> None:
    if isinstance(value, Tracer):
        remedy = "it fixes a shape: close over it or make it a static argument"
        raise ValueError(f"{name} must be a concrete integer, got the tracer {value}; {remedy}")
    _check_count(name, value, at_least=1)


def _check_samples(samples: Any) -> None:
    if np.ndim(samples) != 1 or np.size(samples) == 0:
        raise ValueError(
            f"samples must have shape (n,) with n >= 1, got shape {np.shape(samples)}; "
            "give one measured latency in seconds per call"
        )
    if isinstance(samples, Tracer):
        return
    bad = np.flatnonzero(~(np.asarray(samples) >= 0))
    if bad.size:
        raise ValueError(
            f"samples must be seconds, not negative and not NaN, got {samples[bad[0]]} at index {bad[0]}; "
            "drop failed measurements, or give inf for a call never answered"
        )
