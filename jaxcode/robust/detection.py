r"""Defences: functions that detect faulty workers by their answers.

A worker answers every group of a batch, and a faulty one is assumed to be faulty in all of them. So evidence is pooled
by worker, over groups and outputs, and a worker is trusted or flagged for the whole batch. One group is little evidence
where workers are sparse. `leave_one_out` compares each answer with the curve through the others, as decoders fit it.
`error_locator` is that of ApproxIFER for Berrut's code, for comparison.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._float64 import constant_in_float64
from ..checks import check_count, check_mask
from ..codes import AbstractCode, Plan
from .search import find_outliers

# Outputs examined, of all groups together and evenly spaced among all: more are more evidence, and take more time.
MAX_OUTPUTS = 256
# Ratios of residuals up to MIN_RATIO exp(CHANCE / sqrt(groups)) pass for those of correct workers. Larger limits miss
# small errors. Without CHANCE, correct workers are flagged where there are few groups: see
# `test_hardly_any_correct_worker_is_flagged_for_one_group_and_output`. No command fitted them.
MIN_RATIO, CHANCE = 1.2, 3.0


class Detection(NamedTuple):
    """Holds the workers that a defence trusts and flags, and their scores.

    Attributes:
        trusted: Which workers returned and are trusted, bool, shape (N,): a mask for `code.decode`.
        flagged: Which workers returned and are found faulty, bool, shape (N,); they are not trusted.
        score: How far a worker's answers are from what is expected of a correct one, float32, shape (N,), in units
            that depend on the defence. Infinite for answers that are not finite, zero for workers that did not return.
        unresolved: Which workers returned answers of which it cannot be told whether they are wrong, bool, shape (N,);
            None where the defence does not tell.
        evidence: What all requests so far say about each worker, float32, one number each; None for defences that look
            at one request only.
    """

    trusted: Bool[Array, "workers"]
    flagged: Bool[Array, "workers"]
    score: Float[Array, "workers"]
    unresolved: Bool[Array, "workers"] | None = None
    evidence: Float[Array, "machines"] | None = None


# Maps a code, answers as leaves (N, groups, ...) and the mask of the workers that returned to a detection. One with an
# attribute `keeps_evidence`, which is True, also takes `plans`, `evidence` and `worker`, as `SequentialTest` does.
Defence = Callable[..., Detection]


def detect(
    defence: Defence,
    code: AbstractCode,
    answers: PyTree[Array],
    returned: Bool[ArrayLike, "workers"],
    *,
    plans: Plan | None,
    evidence: Float[ArrayLike, "machines"] | None,
    worker: Int[ArrayLike, "workers"] | None = None,
) -> Detection:
    """Calls a defence with what it takes; the last three are as for `SequentialTest`."""
    if keeps_evidence(defence):
        return defence(code, answers, returned, plans=plans, evidence=evidence, worker=worker)
    return defence(code, answers, returned)


def keeps_evidence(defence: Defence | None) -> bool:
    """Returns whether a defence takes the evidence of earlier requests."""
    return bool(getattr(defence, "keeps_evidence", False))


def finite(answers: PyTree[Array], returned: Bool[ArrayLike, "workers"]) -> Bool[Array, "workers"]:
    """Finds the workers that returned finite numbers only.

    Args:
        answers: Leaves of shape (N, ...), of any dtype; whole numbers are finite.
        returned: Which workers returned, bool, shape (N,). Answers of the others are not read.

    Returns:
        bool, shape (N,).

    Raises:
        ValueError: If returned is not bool (N,), or a leaf's leading axis is not N.

    >>> finite(jnp.array([[1.0, 2.0], [jnp.nan, 3.0], [4.0, jnp.inf]]), jnp.array([True, True, True]))
    Array([ True, False, False], dtype=bool)
    """
    result = jnp.asarray(returned)
    for leaf in _per_worker(answers, returned):
        result = result & jnp.all(jnp.isfinite(leaf), axis=(1, 2))
    return result


def only_finite(code: AbstractCode, answers: PyTree[Array], returned: Bool[ArrayLike, "workers"]) -> Detection:
    """Flags the workers of which any answer, in any group, is not finite; for every code.

    Args:
        code: Any code; only its number of workers is read.
        answers: Leaves of shape (N, groups, ...), of any dtype.
        returned: Which workers returned, bool, shape (N,). Answers of the others are not read.

    Returns:
        The detection; scores are infinite for flagged workers and zero for all others.

    Raises:
        ValueError: If returned is not bool (N,), or a leaf's leading axis is not N.

    >>> from jaxcode.codes import UncodedCode
    >>> two_groups = jnp.array([[1.0, 2.0], [3.0, jnp.nan], [5.0, 6.0]])
    >>> only_finite(UncodedCode(3), two_groups, jnp.array([True, True, False])).flagged
    Array([False,  True, False], dtype=bool)
    """
    check_mask("returned", returned, code.num_workers)
    valid = finite(answers, returned)
    return _detection(jnp.asarray(returned), valid, valid)


def leave_one_out(
    code: AbstractCode,
    answers: PyTree[Array],
    returned: Bool[ArrayLike, "workers"],
    *,
    max_fraction: float = 1 / 3,
) -> Detection:
    r"""Flags workers whose answers are far from the curve through the answers of the others.

    Answers are modelled as noisy values of a curve with :math:`g'' = \sqrt{b} \rho^{3/2} \times` white noise, the
    process whose posterior mean is the cubic spline. :math:`\rho` is the density of the data nodes: where they are
    dense, the curve moves fast through the inputs. With P the precision of the answers y, straight lines projected out,
    worker i's leave-one-out residual is :math:`(Py)_i / P_{ii}` and its variance :math:`b / P_{ii}`, which is large
    where workers are sparse. To leave out a set L of outliers takes one solve of the size of L.

    The variance of the noise is a fraction of v, the median over workers of the variance without noise: 0.1 for a
    worker alone at its node, 0.4 for each of two at one node, and for three or more what their deviations from their
    mean show, from 0.01 to 0.4. More noise hides errors; less of it calls correct workers wrong.

    The search starts from trusting all workers and looks for the set L with the shortest description of all answers

    .. math::
        (n - 2) \log \frac{y^T P_{-L}\, y}{n - |L| - 2} + \sum_{i \in L} \log (1 + z_i^2) + 4 |L|,

    in the mean over outputs and groups, where n workers returned finite answers and :math:`z_i` is an outlier's
    standardised distance from the curve through the inliers: a Gaussian code for inliers, a heavy-tailed one for
    outliers. Each step makes a run of one to three neighbouring inliers outliers, or one outlier an inlier, whichever
    shortens the description most; so faulty workers that support each other are removed together, and correct workers
    next to a faulty one return. Because of the logarithm no output dominates the others.

    A worker's score compares its residuals with those of the inliers. Standardised residuals z are pooled over groups
    and outputs in the mean of :math:`\log(1 + z^2)`, and divided by a typical one, since residuals are large where f is
    rough: the median of the worker's ten neighbours or of all inliers, whichever is larger. The score is this ratio
    over the largest that passes for a correct worker's, the larger of two: the inliers' median plus 4.5 standard
    deviations, estimated from their 70 % quantile, which is not moved by a few faulty workers that were not found; and
    :math:`1.2 \exp(3 / \sqrt{\text{groups}})`, since ratios scatter more with few groups. Outliers become inliers
    again, the lowest score first, until all of them score at least 1.

    Answers that are not finite are flagged in any case. Nothing here is differentiated: gradients through
    decoded results are those for the mask that was found. Computed in float64, in :math:`O(N^3)` time per step.

    Args:
        code: A code that draws a curve through answers at its worker nodes: splines, Berrut, Lagrange.
        answers: Leaves of shape (N, groups, ...), real, in any units. More groups and outputs are more evidence. At
            most 256 outputs of all groups together are examined, evenly spaced among them.
        returned: Which workers returned, bool, shape (N,). Answers of the others are not read.
        max_fraction: The largest fraction, from 0 to 1, that may be flagged of the workers that returned finite
            answers, less two.

    Returns:
        The detection; flagged workers score at least 1.

    Raises:
        ValueError: If the code draws no curve, returned is not bool (N,), a leaf's leading axis is not N, or
            max_fraction is not a number from 0 to 1.

    References:
        arXiv 2502.08058 for spline codes against o(N) adversaries; Wahba, Journal of the Royal Statistical Society B 40
        (1978), for the process; Rousseeuw and Leroy, Robust Regression and Outlier Detection (1987), for masking.

    >>> from jaxcode.codes import SplineCode
    >>> code = SplineCode.chebyshev(num_data=10, num_workers=30)
    >>> answers = jnp.sin(code.encode(jnp.linspace(0.0, 3.0, 10))).at[jnp.array([7, 20])].add(1.0)
    >>> jnp.flatnonzero(leave_one_out(code, answers[:, None], jnp.ones(30, bool)).flagged).tolist()
    [7, 20]

    Four groups at once: worker 12 is wrong by little, but in all of them.

    >>> inputs = jnp.linspace(0.0, 3.0, 10)[:, None] + jnp.arange(4.0)
    >>> answers = jnp.sin(code.encode(inputs)).at[12].add(0.1)
    >>> jnp.flatnonzero(leave_one_out(code, answers, jnp.ones(30, bool)).flagged).tolist()
    [12]
    """
    nodes = _nodes_of("leave_one_out", code)
    check_mask("returned", returned, code.num_workers)
    if not 0 <= max_fraction <= 1:
        raise ValueError(f"max_fraction is {max_fraction!r}; expected a number from 0 to 1")
    valid = finite(answers, returned)
    outputs, groups, rounding = _outputs(answers, valid)
    threshold = MIN_RATIO * math.exp(CHANCE / math.sqrt(groups))
    outliers, score = constant_in_float64(
        lambda *arrays: find_outliers(*arrays, rounding, max_fraction, threshold),
        nodes.workers,
        nodes.data,
        outputs,
        valid,
    )
    return _detection(jnp.asarray(returned), valid, valid & ~outliers, score)


def error_locator(
    code: AbstractCode, answers: PyTree[Array], returned: Bool[ArrayLike, "workers"], *, num_faulty: int
) -> Detection:
    r"""Flags a given number of workers by the error locator of ApproxIFER.

    For each output, polynomials P of degree K + E - 1 and Q of degree E are fitted such that
    :math:`P(\beta_n) \approx y_n Q(\beta_n)`: where a worker is faulty Q must vanish. The E workers with the least
    :math:`|Q(\beta_n)|` get a vote from each output, and the E workers with the most votes are flagged.

    P and Q are in Chebyshev's basis and Q has unit norm, where the paper has powers and a constant term of 1.

    Args:
        code: As for `leave_one_out`.
        answers: As for `leave_one_out`.
        returned: As for `leave_one_out`.
        num_faulty: E >= 1, static. This many are flagged even if none is faulty. The paper requires
            N >= 2K + 2E + S - 1.

    Returns:
        The detection; the score is the fraction of the outputs that voted for the worker.

    Raises:
        ValueError: If the code draws no curve, returned is not bool (N,), a leaf's leading axis is not N, or num_faulty
            is not a whole number of at least 1.

    References:
        arXiv 2109.09868, section 4 and algorithm 2.

    >>> from jaxcode.codes import BerrutCode
    >>> code = BerrutCode.chebyshev(num_data=4, num_workers=16)
    >>> answers = jnp.sin(code.encode(jnp.linspace(0.0, 1.0, 4))).at[5].add(1.0)
    >>> defence = functools.partial(error_locator, num_faulty=1)
    >>> jnp.flatnonzero(defence(code, answers[:, None], jnp.ones(16, bool)).flagged).tolist()
    [5]
    """
    nodes = _nodes_of("error_locator", code)
    check_mask("returned", returned, code.num_workers)
    num_faulty = check_count("num_faulty", num_faulty)
    valid = finite(answers, returned)
    outputs, _, _ = _outputs(answers, valid)
    votes = constant_in_float64(
        lambda *arrays: _locate(*arrays, code.num_data, num_faulty), nodes.workers, outputs, valid
    )
    rank = jnp.argsort(jnp.argsort(jnp.where(valid, -votes, 1)))
    return _detection(jnp.asarray(returned), valid, valid & (rank >= num_faulty), votes)


def _nodes_of(name, code):
    if code.nodes is None:
        raise ValueError(
            f"code is {code!r}; expected for {name} a code that draws a curve through the answers, such as "
            "SplineCode.repeated(num_data=20, num_workers=30), which contains replication; for others: only_finite"
        )
    return code.nodes


def _per_worker(answers, returned):
    """Reshapes every leaf (N, groups, ...) to (N, groups, features)."""
    workers = np.size(returned)
    check_mask("returned", returned, workers)
    leaves = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(answers):
        if np.ndim(leaf) < 1 or leaf.shape[0] != workers:
            name = f"answers{jax.tree_util.keystr(path)}"
            raise ValueError(f"{name} has shape {np.shape(leaf)}; expected a leading axis of {workers}, the workers")
        groups = leaf.shape[1] if np.ndim(leaf) > 1 else 1
        leaves.append(jnp.asarray(leaf).reshape(workers, groups, -1))
    return leaves


def _outputs(answers, valid):
    """Selects outputs (N, outputs), zero where not valid; returns the number of groups and the rounding too."""
    leaves = [jax.lax.stop_gradient(leaf) for leaf in _per_worker(answers, valid)]
    leaves = [leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.astype(jnp.float32) for leaf in leaves]
    max_outputs = max(1, MAX_OUTPUTS // max(1, len(leaves)))
    samples = []
    for leaf in leaves:
        rows = leaf.reshape(leaf.shape[0], -1)
        if rows.shape[1] > max_outputs:
            rows = rows[:, np.linspace(0, rows.shape[1] - 1, max_outputs).round().astype(np.int32)]
        samples.append(rows.astype(jnp.promote_types(rows.dtype, jnp.float32)))
    dtype = jnp.result_type(*[rows.dtype for rows in samples], jnp.float32)
    rows = [rows.astype(dtype) for rows in samples]
    outputs = jnp.concatenate(rows, axis=1) if rows else jnp.zeros((*np.shape(valid), 0))
    groups = max((leaf.shape[1] for leaf in leaves), default=1)
    rounding = max((float(jnp.finfo(leaf.dtype).eps) for leaf in leaves), default=1.0)
    return jnp.where(valid[:, None], outputs, 0), groups, rounding


@jax.jit
def _detection(returned, valid, trusted, score=None):
    """Assembles a detection; scores are zero where not given, and infinite for answers that are not finite."""
    score = jnp.zeros(valid.shape, jnp.float32) if score is None else score.astype(jnp.float32)
    return Detection(trusted, returned & ~trusted, jnp.where(valid, score, jnp.where(returned, jnp.inf, 0)))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _locate(nodes, outputs, valid, num_data, num_faulty):
    n = len(nodes)
    angle = jnp.arccos(jnp.clip(2 * (nodes - nodes[0]) / (nodes[-1] - nodes[0]) - 1, -1, 1))[:, None]
    degree = jnp.arange(min(num_data + num_faulty, n), dtype=angle.dtype)[None]
    basis = jnp.where(valid[:, None], jnp.cos(degree * angle), 0)
    numerators, _ = jnp.linalg.qr(basis)
    denominators = jnp.cos(jnp.arange(num_faulty + 1, dtype=angle.dtype)[None] * angle)

    def vote(y):
        size = jnp.max(jnp.abs(y))
        product = (y / jnp.where(size > 0, size, 1))[:, None] * denominators
        # The component of Q times the answers that is orthogonal to all numerators.
        product = product - numerators @ (numerators.T @ product)
        product = jnp.where(valid[:, None], product, 0)
        q = jnp.linalg.eigh(product.T @ product)[1][:, 0]
        magnitude = jnp.where(valid, jnp.abs(denominators @ q), jnp.inf)
        return (jnp.argsort(jnp.argsort(magnitude)) < num_faulty) & valid

    votes = jax.vmap(vote, 1)(outputs).astype(angle.dtype)
    return jnp.mean(votes, axis=0) if outputs.shape[1] else jnp.zeros(n)
