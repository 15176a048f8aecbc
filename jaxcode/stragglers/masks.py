"""Draws which workers return."""

import abc
from typing import final

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Integer, PRNGKeyArray, Real

from .._arrays import as_float, as_int
from .._pytree import pytree
from ..checks import check_at_most, check_count, check_scalar
from .latency import AbstractLatency


class AbstractStragglers(abc.ABC):
    """Draws which workers return."""

    @abc.abstractmethod
    def sample(self, key: PRNGKeyArray, num_workers: int) -> Bool[Array, "workers"]:
        """Draws one mask.

        Args:
            key: The random key, typed or legacy.
            num_workers: N, static.

        Returns:
            Bool, shape (N,): True where the worker's answer returned.

        Raises:
            ValueError: If num_workers is not an integer of at least 1, or if the model asks for more workers than
                there are.
        """


@final
@pytree()
class Uniform(AbstractStragglers):
    r"""Draws exactly S stragglers, every set of S equally likely.

    .. math:: P(\mathcal{S}) = \binom{N}{S}^{-1}, \qquad |\mathcal{S}| = S

    These are the straggler sets of the experiments in the reference.

    Attributes:
        num_stragglers: S, an integer, 0 <= S <= num_workers. A leaf: a traced S does not recompile.

    Raises:
        ValueError: If num_stragglers is not an integer or is negative, or, in `sample`, if it exceeds num_workers.

    References:
        Moradi, Tahmasebi and Maddah-Ali, Coded Computing for Resilient Distributed Computing: A Learning-Theoretic
        Framework, arXiv 2406.00300.

    >>> returned = Uniform(num_stragglers=5).sample(jax.random.key(0), num_workers=30)
    >>> returned.shape, int(returned.sum())
    ((30,), 25)
    """

    num_stragglers: Integer[ArrayLike, ""]

    def __post_init__(self):
        expected = "an integer of at least 0: give a whole number of workers"
        check_scalar("num_stragglers", self.num_stragglers, lambda count: count >= 0, expected, integer=True)

    def sample(self, key: PRNGKeyArray, num_workers: int) -> Bool[Array, "workers"]:
        check_count("num_workers", num_workers)
        check_at_most("num_stragglers", self.num_stragglers, num_workers, "num_workers")
        return jax.random.permutation(key, num_workers) >= as_int(self.num_stragglers)


@final
@pytree()
class Independent(AbstractStragglers):
    r"""Draws each worker as a straggler with probability p, independently of the others.

    .. math:: P(\mathcal{S}) = p^{|\mathcal{S}|} (1 - p)^{N - |\mathcal{S}|}

    Any number of workers may return, none included.

    Attributes:
        probability: p in [0, 1], the chance that one worker does **not** return; drawn in steps of 2^-23 unless x64 is
            enabled. A leaf.

    Raises:
        ValueError: If probability is not a number in [0, 1].

    References:
        arXiv 2502.00645 bounds the error of coded computing under these stragglers.

    >>> Independent(probability=0.0).sample(jax.random.key(0), num_workers=4)
    Array([ True,  True,  True,  True], dtype=bool)
    """

    probability: Real[ArrayLike, ""]

    def __post_init__(self):
        expected = "a number in [0, 1]: give the chance that one worker straggles, e.g. 0.1"
        check_scalar("probability", self.probability, lambda p: 0 <= p <= 1, expected)

    def sample(self, key: PRNGKeyArray, num_workers: int) -> Bool[Array, "workers"]:
        check_count("num_workers", num_workers)
        return ~jax.random.bernoulli(key, as_float(self.probability), (num_workers,))


@final
@pytree()
class FirstToAnswer(AbstractStragglers):
    """Draws which workers are the first to answer, a given number of them.

    The workers that return have the `num_answers` shortest latencies of `latency.sample(key, num_workers)`, drawn with
    the same key. Ties are broken at random, so a coarse clock favours no worker. A worker whose latency is `inf` or NaN
    never returns, so fewer than `num_answers` return if fewer are alive.

    Attributes:
        latency: How long workers take.
        num_answers: How many answers to wait for, usually N - S; an integer, 1 <= num_answers <= num_workers. A leaf: a
            traced num_answers does not recompile.

    Raises:
        ValueError: If num_answers is not an integer or is below 1, or, in `sample`, if it exceeds num_workers.

    >>> from jaxcode.stragglers import Empirical
    >>> latency = Empirical([0.1, 0.1, 0.2])
    >>> int(FirstToAnswer(latency, num_answers=25).sample(jax.random.key(0), num_workers=30).sum())
    25
    """

    latency: AbstractLatency
    num_answers: Integer[ArrayLike, ""]

    def __post_init__(self):
        expected = "an integer of at least 1: give a whole number of workers"
        check_scalar("num_answers", self.num_answers, lambda count: count >= 1, expected, integer=True)

    def sample(self, key: PRNGKeyArray, num_workers: int) -> Bool[Array, "workers"]:
        check_count("num_workers", num_workers)
        check_at_most("num_answers", self.num_answers, num_workers, "num_workers")
        seconds = self.latency.sample(key, num_workers)
        # The latencies take the key itself, as a caller's own draw does, so ties take one derived from it.
        tie_breaker = jax.random.permutation(jax.random.fold_in(key, as_int(1)), num_workers)
        rank = jnp.argsort(jnp.lexsort((tie_breaker, seconds)))
        return (rank < as_int(self.num_answers)) & jnp.isfinite(seconds)


@final
@pytree()
class Deadline(AbstractStragglers):
    """Draws which workers answer by a deadline.

    The workers that return have latencies of at most `seconds` in `latency.sample(key, num_workers)`, drawn with the
    same key. Any number of workers may return, none included. A latency of `inf` or NaN meets no deadline.

    Attributes:
        latency: How long workers take.
        seconds: The deadline, positive; `inf` waits for every worker that ever answers. A leaf.

    Raises:
        ValueError: If seconds is not a positive number.

    >>> from jaxcode.stragglers import ShiftedExponential
    >>> latency = ShiftedExponential(shift=0.1, scale=0.02)
    >>> Deadline(latency, seconds=0.09).sample(jax.random.key(0), num_workers=3)
    Array([False, False, False], dtype=bool)
    """

    latency: AbstractLatency
    seconds: Real[ArrayLike, ""]

    def __post_init__(self):
        expected = "a number in (0, inf]: give the longest wait in seconds, e.g. 0.2"
        check_scalar("seconds", self.seconds, lambda seconds: seconds > 0, expected)

    def sample(self, key: PRNGKeyArray, num_workers: int) -> Bool[Array, "workers"]:
        seconds = self.latency.sample(key, num_workers)
        return (seconds <= as_float(self.seconds)) & jnp.isfinite(seconds)
