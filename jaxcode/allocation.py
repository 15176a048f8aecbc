r"""Allocates redundant workers to the inputs whose loss would cost most.

Every input has a worker of its own, so that results are f's exactly when nobody is late. The remaining workers compute
copies. If an input's c copies are all late it is lost, and a surrogate's guess takes its place, which is wrong, or off,
by the input's risk. So the expected loss of a group is

.. math:: \sum_k r_k \, P(c_k), \qquad \sum_k c_k = N, \quad c_k \ge 1,

with P(c) the probability that c given workers are all late. P is convex for uniform stragglers, and then giving workers
one by one to the input with the largest :math:`r_k (P(c_k) - P(c_k + 1))` is optimal.

References:
    Fox, Discrete optimization via marginal analysis, Management Science 13 (1966), for the greedy rule.
"""

import dataclasses
import functools
from typing import NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ._pytree import pytree
from .checks import batch_size, check_count
from .codes import AbstractCode, Plan, Prior
from .stragglers import AbstractStragglers
from .surrogates import Surrogate
from .surrogates.calibration import SQUARED_ERROR

__all__ = ["Guesses", "PriorPlanner", "assign", "lost_probability", "plan", "spread"]

_NUM_SETS = 1024


def lost_probability(
    stragglers: AbstractStragglers, num_workers: int, key: PRNGKeyArray | None = None
) -> Float[Array, "counts"]:
    r"""Computes the probability that all of c workers are late, for workers chosen at random.

    .. math:: P(c) = \operatorname{E} \prod_{j < c} \frac{L - j}{N - j}

    with L the number of late workers, over 1,024 drawn sets. For `Uniform`, whose L is fixed, it is exact.

    Args:
        stragglers: Which workers are late.
        num_workers: N.
        key: Random key of the sets; that of seed 0 if not given.

    Returns:
        P(0), ..., P(N), shape (N + 1,), from 1 downwards.

    Raises:
        ValueError: If stragglers is no straggler model, or num_workers is not a whole number of at least 1.

    >>> from jaxcode.stragglers import Uniform
    >>> [round(float(probability), 3) for probability in lost_probability(Uniform(2), num_workers=4)]
    [1.0, 0.5, 0.167, 0.0, 0.0]
    """
    if not isinstance(stragglers, AbstractStragglers):
        raise ValueError(f"stragglers is {stragglers!r}; expected a model such as jaxcode.stragglers.Uniform(5)")
    num_workers = check_count("num_workers", num_workers)
    return _lost_probability(stragglers, num_workers, jax.random.key(0) if key is None else key)


@functools.partial(jax.jit, static_argnums=1)
def _lost_probability(stragglers, num_workers, key):
    masks = jax.vmap(lambda key: stragglers.sample(key, num_workers))(jax.random.split(key, _NUM_SETS))
    num_late = jnp.sum(~masks, axis=1)[:, None]
    drawn = jnp.arange(num_workers)[None]
    factors = jnp.maximum(num_late - drawn, 0) / (num_workers - drawn)
    products = jnp.cumprod(factors, axis=1).mean(axis=0)
    return jnp.concatenate([jnp.ones(1), products]).astype(jnp.float32)


def assign(
    risk: Float[ArrayLike, "data"], lost: Float[ArrayLike, "counts"], *, may_guess: bool = False
) -> Int[Array, "workers"]:
    """Assigns an input to each worker so that the expected loss is least.

    Traced; the same shapes compile once. Ties are broken in the inputs' order, so that equal risks give replication's
    own assignment.

    Args:
        risk: Expected loss of each input if it is lost, not negative, (K,). NaN counts as the largest.
        lost: The probability that c workers are all late, from `lost_probability`, (N + 1,).
        may_guess: Whether an input may have no worker at all, where its guess is good enough. If not, worker k < K
            computes input k.

    Returns:
        The number of the input that each worker computes, int32 (N,).

    Raises:
        ValueError: If there are fewer workers than inputs and they may not be guessed.

    >>> from jaxcode.stragglers import Uniform
    >>> assign(jnp.array([0.5, 0.0, 0.1]), lost_probability(Uniform(2), num_workers=6))
    Array([0, 1, 2, 0, 0, 2], dtype=int32)
    """
    risk, lost = jnp.asarray(risk), jnp.asarray(lost)
    num_data, num_workers = risk.shape[0], lost.shape[0] - 1
    if num_workers < num_data and not may_guess:
        raise ValueError(
            f"lost is for {num_workers} workers and risk for {num_data} inputs; expected at least as many workers: "
            "give may_guess=True to leave inputs to their guesses"
        )
    return _assign(risk, lost, may_guess)


@functools.partial(jax.jit, static_argnums=2)
def _assign(risk, lost, may_guess):
    num_data, num_workers = risk.shape[0], lost.shape[0] - 1
    first = 0 if may_guess else 1
    num_free = num_workers - (0 if may_guess else num_data)
    risk = jax.lax.stop_gradient(jnp.where(jnp.isnan(risk), jnp.inf, jnp.maximum(risk, 0)))
    # The largest finite number, not infinity, which times a zero would be NaN.
    risk = jnp.minimum(risk, jnp.finfo(risk.dtype).max)
    gains = lost[first : first + max(num_free, 1)] - lost[first + 1 : first + 1 + max(num_free, 1)]
    # The gains of an input's copies must not grow, or a later copy would come before an earlier one.
    gains = jax.lax.stop_gradient(jnp.minimum.accumulate(gains))
    _, flat = jax.lax.top_k((gains.astype(risk.dtype)[:, None] * risk[None]).reshape(-1), num_free)
    own = jnp.arange(num_workers - num_free, dtype=jnp.int32)
    return jnp.concatenate([own, (flat % num_data).astype(jnp.int32)])


def spread(risk: Float[ArrayLike, "batch"], num_data: int) -> Int[Array, "batch"]:
    """Orders a batch so that its groups of K have about equal shares of the risk.

    The riskiest inputs are dealt out first, one to each group, then the next ones. So copies that are placed within
    each group come close to the best placement in the whole batch.

    Args:
        risk: Of each input, (B,).
        num_data: K.

    Returns:
        A permutation of the batch, int32 (B,); its own order where there is one group.

    >>> spread(jnp.array([0.1, 0.9, 0.8, 0.2]), num_data=2)
    Array([1, 0, 2, 3], dtype=int32)
    """
    risk = jax.lax.stop_gradient(jnp.asarray(risk))
    size = risk.shape[0]
    num_groups = -(-size // num_data)
    if num_groups == 1:
        return jnp.arange(size, dtype=jnp.int32)
    member, number = np.arange(size) % num_data, np.arange(size) // num_data
    # Every second row is dealt backwards: the first group would get the riskier input of each row otherwise.
    turn = member * num_groups + np.where(member % 2, num_groups - 1 - number, number)
    riskiest_first = jnp.argsort(-jnp.where(jnp.isnan(risk), jnp.inf, risk), stable=True).astype(jnp.int32)
    return riskiest_first[np.argsort(np.argsort(turn))]


def plan(
    code: AbstractCode,
    x: PyTree[ArrayLike],
    *,
    prior: Surrogate,
    stragglers: AbstractStragglers | None = None,
    loss: str = SQUARED_ERROR,
) -> Plan:
    """Plans one group: which worker computes which input, and the prior means of answers and results.

    Args:
        code: The code. Only one that assigns inputs to workers, such as `ReplicationCode`, has an assignment to plan.
        x: The group, leaves (K, ...).
        prior: Guesses f's answers.
        stragglers: Which workers are late; if None, the code's own assignment stays.
        loss: What a lost input costs, one of `prior.losses`.

    Returns:
        The plan, for `code.encode(x, plan)` and `code.decode(y, returned, plan)`.

    Raises:
        ValueError: If prior is no surrogate, or cannot estimate this loss, or stragglers is given for a code that
            assigns no inputs, or x does not have K inputs.

    >>> import jaxcode as jc
    >>> x = jnp.linspace(0.0, 1.0, 64)[:, None]
    >>> prior = jc.surrogate(jnp.exp, x, progress=False)
    >>> code = jc.ReplicationCode(num_data=4, num_workers=6)
    >>> example = plan(code, x[::16], prior=prior, stragglers=jc.stragglers.Uniform(2))
    >>> results = code.decode(jnp.exp(code.encode(x[::16], example)), jnp.arange(6) > 1, example)
    >>> bool(jnp.max(jnp.abs(results - jnp.exp(x[::16]))) < 0.05)
    True
    """
    planner = make_planner(code, prior, stragglers, loss)
    size = batch_size("x", x)
    if size != code.num_data:
        raise ValueError(f"x has {size} inputs; expected a group of num_data, {code.num_data}")
    return planner.plan(code, x, planner.guess(x))


def make_planner(
    code: AbstractCode, prior: Surrogate, stragglers: AbstractStragglers | None = None, loss: str = SQUARED_ERROR
) -> "PriorPlanner":
    """Makes the planner of a code with a prior; arguments and errors as for `plan`."""
    if not isinstance(prior, Surrogate):
        raise ValueError(f"prior is {prior!r}; expected a surrogate, such as jaxcode.surrogate(f, inputs)")
    if loss not in prior.losses:
        raise ValueError(f"loss is {loss!r}; expected one that this prior estimates: {', '.join(prior.losses)}")
    if stragglers is None:
        return PriorPlanner(prior, None, loss)
    if not code.assigns:
        raise ValueError(
            f"stragglers is given for {type(code).__name__}, whose workers serve all inputs; expected None, or a code "
            "that assigns inputs to workers, such as ReplicationCode"
        )
    return PriorPlanner(prior, lost_probability(stragglers, code.num_workers), loss)


def find_planner(
    code: AbstractCode, prior: Surrogate | None, stragglers: AbstractStragglers | None, loss: str
) -> "PriorPlanner | None":
    """Makes the planner of a code with a prior; None without one. Arguments and errors as for `jaxcode.coded`."""
    if prior is not None:
        return make_planner(code, prior, stragglers, loss)
    if stragglers is not None:
        raise ValueError(
            f"stragglers is {stragglers!r} without a prior; expected both or neither: the prior tells whose loss costs "
            "most"
        )
    return None


class Guesses(NamedTuple):
    """Holds a prior's guesses of the answers to a batch.

    Attributes:
        values: The guesses, leaves (B, ...).
        risk: What each costs if it is the result, (B,).
        errors: Expected error of each, root mean square over its numbers, (B,).
    """

    values: PyTree[Array]
    risk: Float[Array, "batch"]
    errors: Float[Array, "batch"]


@final
@pytree("loss", eq=False)
class PriorPlanner:
    """Plans groups with a prior.

    Attributes:
        prior: Guesses f's answers.
        lost: The probability that c workers are all late, (N + 1,); None to keep a code's own assignment.
        loss: What a lost input costs.
    """

    prior: Surrogate
    lost: Float[Array, "counts"] | None
    loss: str

    def guess(self, x: PyTree[ArrayLike]) -> Guesses:
        """Guesses the answers to a batch, leaves (B, ...)."""
        values, squares = self.prior.with_risk(x)
        risk = squares if self.loss == SQUARED_ERROR else self.prior.with_risk(x, self.loss)[1]
        # Its derivative is finite where a guess is expected to be exact.
        return Guesses(values, risk, jnp.sqrt(jnp.maximum(squares, jnp.finfo(squares.dtype).tiny)))

    def plan(self, code: AbstractCode, group: PyTree[ArrayLike], guesses: Guesses) -> Plan:
        """Plans one group, leaves (K, ...), by the guesses for its inputs."""
        assignment = None if self.lost is None else assign(guesses.risk, self.lost)
        if not code.needs_plan:
            plan = Plan(assignment=assignment)
        elif assignment is None:
            plan = code.plan(group, guesses.risk)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            plan = code.plan(group, guesses.risk, assignment)  # pyright: ignore[reportAttributeAccessIssue]
        mixes = code.encoder_linop(plan).mixes
        if mixes:
            workers = self.guess(code.encode(group, plan))
            values, errors = workers.values, workers.errors
        else:
            values, errors = code.encode((guesses.values, guesses.errors), plan)
        return dataclasses.replace(plan, prior=Prior(values, guesses.values, guesses.errors, errors))
