r"""Detects faulty workers by the evidence of many requests: a sequential test for each worker.

One request tells little about a worker: an answer that is far from what a surrogate guesses may be right. But a correct
worker is no more often among the worst of a request than any other, while a faulty one is so request after request.
"""

import dataclasses
import functools
import math
from typing import ClassVar, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._batched_model import BatchedModel
from ..allocation import make_planner
from ..checks import check_mask
from ..codes import AbstractCode, Plan
from ..codes.abstract import find_copies, mixes_inputs
from ..functions import Model, as_pure_function
from ..ordering import Ordering
from ..outputs import OutputSpace, as_returned
from ..pipeline import encode, flatten_groups, group_with_prior, transform_prior, unflatten_groups
from ..surrogates import Surrogate
from .detection import Detection, finite

# Answers of two workers to one input are the same if they differ by less than this share of the answers' size, or by 16
# units of rounding: other hardware and other batch sizes round in other ways.
_TOLERANCE = 1e-3
_LEAST_GROUPS = 10
_MODEL_BATCH = 256


@final
@dataclasses.dataclass(frozen=True)
class SequentialTest:
    r"""Flags workers whose answers are, request after request, among those farthest from what is expected.

    In each group of K inputs every answer has a score, its squared distance from the prior's guess relative to the
    distance that the prior expects. If all workers are correct, a worker's rank r among the M that returned, 1 for the
    largest score, has any value with equal probability. So

    .. math:: e = \frac{M}{r H_M}, \qquad H_M = \sum_{r=1}^M \frac{1}{r}

    is an e-value: its mean is 1 for a correct worker. Faulty ones among the others only lower it. Workers that all have
    the same answer to one input confirm each other, whatever the prior expects, and get the least e-value; one that is
    outvoted by two which are no farther from the guess gets the largest. A worker's evidence is a decayed CUSUM of
    logarithms,

    .. math:: E \leftarrow \min \bigl( 2 h, \max \bigl( 0, (1 - 1/m) E + \textstyle\sum \log e \bigr) \bigr), \qquad
              h = \log (N T),

    summed over the groups of a request. It is flagged while :math:`E \ge h`. Were nothing forgotten, the mean number of
    requests until a given correct worker is flagged would be at least N T, so that until any of N is flagged about T.
    A worker that becomes correct is trusted again after some requests.

    The ranks of a correct worker are uniform if inputs are not always harder for the same worker. Where coded inputs
    are mixtures they are: make the test by `calibrate` then. Without a prior, only codes of which at least three
    workers compute an input can tell who is wrong: the score is the distance from half of these.

    Evidence is a vector with one number for each worker, which a call takes and its detection returns.
    `jaxcode.CodedServer` keeps it, by the worker of the pool that computed each answer; with `jaxcode.coded` pass it
    on: `_, detection = predict.inspect(x, returned, detection.evidence)`.

    Attributes:
        memory: m, in requests: evidence fades to 1/e in so many.
        run_length: T, in requests.
        baseline: The mean and the standard deviation of the logarithm of each worker's score where all are correct, N
            pairs; see `calibrate`. None for codes that do not mix inputs.

    Raises:
        ValueError: If memory or run_length is not a number above 1.

    References:
        Shin, Ramdas and Rinaldo, E-detectors: a nonparametric framework for sequential change detection, arXiv
        2203.03532; Page, Continuous inspection schemes, Biometrika 41 (1954), for CUSUM.

    >>> from jaxcode.codes import ReplicationCode
    >>> code, test = ReplicationCode(num_data=4, num_workers=12), SequentialTest()
    >>> evidence = None
    >>> for request in range(12):
    ...     answers = code.encode(jnp.sin(jnp.arange(4.0) + request))[:, None]  # one group
    ...     detection = test(code, answers.at[5].add(1.0), jnp.ones(12, bool), evidence=evidence)
    ...     evidence = detection.evidence
    >>> jnp.flatnonzero(detection.flagged).tolist()
    [5]
    """

    memory: float = 50.0
    run_length: float = 1e4
    baseline: tuple[tuple[float, float], ...] | None = None
    keeps_evidence: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("memory", "run_length"):
            value = getattr(self, name)
            if not value > 1:
                raise ValueError(f"{name} is {value!r}; expected a number of requests, above 1")

    def __call__(
        self,
        code: AbstractCode,
        answers: PyTree[Array],
        returned: Bool[ArrayLike, "workers"],
        *,
        plans: Plan | None = None,
        evidence: Float[ArrayLike, "machines"] | None = None,
        worker: Int[ArrayLike, "workers"] | None = None,
    ) -> Detection:
        """Tests the workers by one more request.

        Args:
            code: The code.
            answers: Leaves of shape (N, groups, ...), real.
            returned: Which workers returned, bool, shape (N,). Answers of the others are not read.
            plans: The plans of all groups, with the prior, leaves with the groups as leading axis.
            evidence: What earlier requests say about each worker; None for nothing.
            worker: The index in `evidence` of the worker that gave each answer, where workers serve other coded inputs
                from request to request; negative for none. Worker n's own if not given.

        Returns:
            The detection. Its score is the evidence over h, at least 1 for flagged workers. Where workers give
            different answers to one input, and none is flagged, those that are not the majority are `unresolved`; in a
            request of one group, only those with the least evidence against them are trusted. Unresolved are also
            workers with a score above 1/2, and where there is a prior they are not trusted.

        Raises:
            ValueError: If the code mixes inputs and there is no prior or no baseline, baseline does not have N pairs,
                returned is not bool (N,), or a leaf's leading axis is not N.
        """
        num_workers = code.num_workers
        check_mask("returned", returned, num_workers)
        self._check(code, plans)
        worker = np.arange(num_workers, dtype=np.int32) if worker is None else jnp.asarray(worker)
        evidence = jnp.zeros(num_workers, jnp.float32) if evidence is None else jnp.asarray(evidence, jnp.float32)
        valid = finite(answers, returned)
        limit = math.log(evidence.shape[0] * self.run_length)
        baseline = _no_baseline(num_workers) if self.baseline is None else np.asarray(self.baseline, np.float32)
        returned = jnp.asarray(returned) & (worker >= 0)
        return _test(
            *_compare(code, answers, valid, plans, baseline),
            has_prior=plans is not None and plans.prior is not None,
            valid=valid & returned,
            returned=returned,
            worker=jnp.asarray(worker, jnp.int32),
            evidence=evidence,
            limit=np.float32(limit),
            decay=np.float32(1 - 1 / self.memory),
        )

    def _check(self, code, plans):
        has_prior = plans is not None and plans.prior is not None
        if mixes_inputs(code) and not (has_prior and self.baseline is not None):
            raise ValueError(
                f"code is a {type(code).__name__}, whose coded inputs are mixtures, and the test has "
                f"{'no baseline' if has_prior else 'no prior'}; expected jaxcode.robust.calibrate(f, code, x, prior), "
                "and the same prior for jaxcode.coded or the server"
            )
        if self.baseline is not None and len(self.baseline) != code.num_workers:
            raise ValueError(
                f"baseline has {len(self.baseline)} pairs; expected one for each of {code.num_workers} workers"
            )


def calibrate(
    f: Model,
    code: AbstractCode,
    x: PyTree[ArrayLike],
    prior: Surrogate,
    *,
    order: Ordering | None = None,
    output: OutputSpace = as_returned,
    memory: float = 50.0,
    run_length: float = 1e4,
) -> SequentialTest:
    """Makes the sequential test of a code that mixes inputs, which knows each worker's usual distance from the guesses.

    The model is computed here, on all coded inputs.

    Args:
        f: The model, as for `jaxcode.coded`.
        code: The code.
        x: A sample of inputs, leaves (B, ...): at least ten groups of K; fifty are better.
        prior: The surrogate with which the code is used.
        order: As for `jaxcode.coded`.
        output: As for `jaxcode.coded`.
        memory: As for `SequentialTest`.
        run_length: As for `SequentialTest`.

    Returns:
        The test.

    Raises:
        ValueError: If x holds fewer than ten groups, or as `jaxcode.coded` does.

    >>> import jaxcode as jc
    >>> x = jnp.linspace(0.0, 1.0, 80)[:, None]
    >>> prior = jc.surrogate(jnp.exp, x, progress=False)
    >>> test = calibrate(jnp.exp, jc.SplineCode.systematic(num_data=8, num_workers=12), x, prior)
    >>> len(test.baseline)
    12
    """
    fn, params = as_pure_function(f)
    planner = make_planner(code, prior)
    grouped, grouping, plans = jax.jit(functools.partial(group_with_prior, code, planner, order=order))(x)
    if grouping.size < _LEAST_GROUPS * code.num_data:
        raise ValueError(
            f"x has {grouping.size} inputs; expected at least {_LEAST_GROUPS} groups of {code.num_data}, so that each "
            "worker's usual distance is known"
        )
    coded_inputs = jax.device_get(flatten_groups(encode(code, None, grouped, plans)))
    answers = BatchedModel(fn, params, min(_MODEL_BATCH, code.num_workers * grouping.num_groups))(coded_inputs)
    answers = output.transform(unflatten_groups(answers, code.num_workers))
    everyone = np.ones(code.num_workers, bool)
    plans = transform_prior(plans, output)
    scores = np.float64(_compare(code, answers, everyone, plans, _no_baseline(code.num_workers)).log_score)
    spread = np.maximum(scores.std(axis=1, ddof=1), np.finfo(np.float32).eps)
    baseline = zip(scores.mean(axis=1).tolist(), spread.tolist(), strict=True)
    return SequentialTest(memory, run_length, tuple(baseline))


def _no_baseline(num_workers):
    return np.tile(np.array([0, 1], np.float32), (num_workers, 1))


class _Comparison(NamedTuple):
    """Holds how answers compare with the prior and with each other.

    Attributes:
        log_score: Logarithm of each answer's score, less the worker's baseline, (N, groups); minus infinity where there
            is nothing to compare with, infinity where the answer is outvoted.
        agree: Which pairs of workers have the same answer to the same input, (N, N, groups).
        differ: Which have different answers to it, (N, N, groups).
    """

    log_score: Float[Array, "workers groups"]
    agree: Bool[Array, "workers workers groups"]
    differ: Bool[Array, "workers workers groups"]


def _compare(code, answers, valid, plans, baseline) -> _Comparison:
    """Compares answers, leaves (N, groups, ...); those that are not valid are not read."""
    # Without plans the encoder is known to the host, where nothing is compiled for it.
    copies = find_copies(code)[:, :, None] if plans is None else _find_planned_copies(code, plans)
    return _compare_copies(answers, valid, None if plans is None else plans.prior, copies, baseline)


@jax.jit
def _find_planned_copies(code, plans):
    """Returns which pairs of workers have the same coded input, (N, N, groups)."""
    return jax.vmap(lambda plan: find_copies(code, plan), out_axes=2)(plans)


@jax.jit
def _compare_copies(answers, valid, prior, copies, baseline) -> _Comparison:
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(answers)]
    num_workers, num_groups = leaves[0].shape[:2]
    rounding = max(
        float(jnp.finfo(leaf.dtype).eps) if jnp.issubdtype(leaf.dtype, jnp.floating) else 0.0 for leaf in leaves
    )
    tolerance = max(_TOLERANCE, 16 * rounding)

    def to_rows(tree, axis):
        rows = [jnp.moveaxis(jnp.asarray(leaf), axis, 0).astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
        return jnp.concatenate([leaf.reshape(num_workers, num_groups, -1) for leaf in rows], axis=2)

    rows = jax.lax.stop_gradient(jnp.where(valid[:, None, None], to_rows(answers, 0), 0))
    # Squared distances of each worker's answers from those of all others, one worker at a time.
    distances = jax.lax.map(lambda row: jnp.mean(jnp.square(rows - row[None]), axis=2), rows)
    size = jnp.sum(jnp.mean(jnp.square(rows), axis=2), axis=0) / jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1)
    same = copies & valid[:, None, None] & valid[None, :, None]
    agree = same & (distances <= tolerance**2 * size[None, None])
    differ = same & ~agree
    if prior is not None:
        means = jax.lax.stop_gradient(to_rows(prior.workers, 1))
        score = jnp.mean(jnp.square(rows - means), axis=2)
        if prior.worker_errors is not None:
            squares = jnp.square(jnp.asarray(prior.worker_errors).astype(jnp.float32).T)
            score = score / jnp.maximum(squares, jnp.finfo(jnp.float32).tiny)
    else:
        # The lower median of the distances from others with the same input; of two nobody can tell who is wrong.
        count = jnp.sum(same, axis=1, dtype=jnp.int32)
        ascending = jnp.sort(jnp.where(same, distances, jnp.inf), axis=1)
        middle = jnp.maximum(count - 1, 0)[:, None] // 2
        score = jnp.where(count >= 2, jnp.take_along_axis(ascending, middle, axis=1)[:, 0], 0)
    score = jnp.minimum(jnp.where(jnp.isnan(score), jnp.inf, score), jnp.finfo(jnp.float32).max)
    # A score is also the largest where two others agree on another answer that is no farther from the guess.
    is_nearer = differ & (score[None] <= score[:, None])
    num_votes = jnp.einsum("nmg,mlg,nlg->ng", *(pairs.astype(jnp.float32) for pairs in (is_nearer, agree, differ)))
    log_score = jnp.where(num_votes > 0, jnp.inf, (jnp.log(score) - baseline[:, :1]) / baseline[:, 1:])
    return _Comparison(log_score, agree, differ)


@functools.partial(jax.jit, static_argnames="has_prior")
def _test(log_score, agree, differ, *, has_prior, valid, returned, worker, evidence, limit, decay) -> Detection:
    """Adds a request to the evidence and decides."""
    num_groups = log_score.shape[1]
    is_confirmed = agree.any(axis=1) & ~differ.any(axis=1)

    # Ranks among the valid answers of workers that are not flagged, other than the worker itself.
    is_reference = valid & (evidence[worker] < limit)
    is_other = is_reference[None] & (worker[:, None] != worker[None])
    is_larger = is_other[:, :, None] & (log_score[None] >= log_score[:, None])
    num_larger, num_others = (jnp.sum(pairs, axis=1, dtype=jnp.int32) for pairs in (is_larger, is_other))
    harmonic = jnp.cumsum(1 / jnp.arange(1, log_score.shape[0] + 2, dtype=jnp.float32))[num_others]
    size = 1 + num_others.astype(jnp.float32)
    rank = jnp.where(is_confirmed, size[:, None], 1 + num_larger.astype(jnp.float32))
    rank = jnp.where((returned & ~valid)[:, None], 1, rank)
    e_value = jnp.where(returned[:, None], size[:, None] / (rank * harmonic[:, None]), 0)

    # The mean over a worker's answers in a group, then the product over groups.
    is_served_by = (worker[None] == np.arange(evidence.shape[0], dtype=np.int32)[:, None]) & returned[None]
    is_served_by = is_served_by.astype(jnp.float32)
    num_answers = jnp.sum(is_served_by, axis=1)
    mean = jnp.matmul(is_served_by, e_value, precision=jax.lax.Precision.HIGHEST)
    mean = mean / jnp.maximum(num_answers, 1)[:, None]
    increment = jnp.where(num_answers > 0, jnp.log(jnp.where(mean > 0, mean, 1)).sum(axis=1), 0)
    evidence = jnp.clip(decay * evidence + increment, 0, 2 * limit)

    against = jnp.where(worker >= 0, evidence[worker], 0)
    is_faulty = against >= limit
    flagged = returned & (~valid | is_faulty)
    differs = differ & ~is_faulty[None, :, None]
    num_agree, num_differ = (jnp.sum(pairs, axis=1, dtype=jnp.int32) for pairs in (agree, differs))
    is_minority = num_agree < num_differ
    is_contested = (differs.any(axis=1) & is_minority).any(axis=1)
    is_suspect = against >= limit / 2
    unresolved = valid & ~flagged & (is_contested | is_suspect)
    trusted = valid & ~flagged
    if has_prior:
        trusted = trusted & ~is_suspect
    if num_groups == 1:
        is_worse = (differs[:, :, 0] & (against[None] < against[:, None])).any(axis=1)
        trusted = trusted & ~(is_contested & is_worse)
    score = jnp.where(returned, jnp.where(valid, against / limit, jnp.inf), 0).astype(jnp.float32)
    return Detection(trusted, flagged, score, unresolved, evidence)
