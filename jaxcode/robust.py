r"""Workers that lie: answers that are not numbers, and answers that are wrong.

A defence is any function `(code, answers, returned) -> Suspicion` that can be traced: it says which of the workers that
returned are to be believed. `coded(f, code, defence=...)` decodes from those alone, as if the others were late.

A worker lies in every group of a batch and in every output at once, so evidence is pooled per worker; one group says
little where workers are sparse. `leave_one_out` asks the curve that codes rely on anyway: is an answer where those of
the others let one expect it? `error_locator` is what ApproxIFER does for Berrut's code, to compare with.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree

from ._checks import check_count, check_mask
from ._float64 import fixed_in_float64
from ._leave_one_out import find_suspects
from .codes.abstract import AbstractInterpolatingCode, AbstractLinearCode

# Outputs, of all groups together, that are looked at, spread evenly over all; more would tell no more.
MOST_OUTPUTS = 256


class Suspicion(NamedTuple):
    """What a defence has found.

    Attributes:
        returned: Which workers returned and are believed, bool, shape (N,): a mask for `code.decode`.
        suspected: Which workers returned and are not believed, bool, shape (N,).
        score: How far a worker's answers are from what is expected of an honest one, float32, shape (N,); what they are
            measured in is the defence's own. Infinite for answers that are not numbers, zero where none came.
    """

    returned: Bool[Array, "workers"]
    suspected: Bool[Array, "workers"]
    score: Float[Array, "workers"]


Defence = Callable[[AbstractLinearCode, PyTree[Array], Bool[ArrayLike, "workers"]], Suspicion]


def finite(answers: PyTree[Array], returned: Bool[ArrayLike, "workers"]) -> Bool[Array, "workers"]:
    """Which workers returned numbers: NaN or infinity anywhere in a worker's answers, and it has not returned.

    Args:
        answers: Leaves of shape (N, ...), or (groups N, ...) with the groups one after the other.
        returned: Which workers returned, bool, shape (N,).

    Returns:
        bool, shape (N,).

    Raises:
        ValueError: If returned is not bool (N,), or a leaf's leading axis is not a multiple of N.

    >>> finite(jnp.array([[1.0, 2.0], [jnp.nan, 3.0], [4.0, jnp.inf]]), jnp.array([True, True, True]))
    Array([ True, False, False], dtype=bool)
    """
    right = jnp.asarray(returned)
    for leaf in _per_worker(answers, returned):
        right = right & jnp.all(jnp.isfinite(leaf), axis=(0, 2))
    return right


def only_finite(code: AbstractLinearCode, answers: PyTree[Array], returned: Bool[ArrayLike, "workers"]) -> Suspicion:
    """The defence that believes every number. For every code; arguments and errors as for `leave_one_out`."""
    check_mask("returned", returned, code.num_workers)
    right = finite(answers, returned)
    return _report(returned, right, right, jnp.zeros(code.num_workers))


def leave_one_out(
    code: AbstractInterpolatingCode,
    answers: PyTree[Array],
    returned: Bool[ArrayLike, "workers"],
    *,
    most: float = 1 / 3,
) -> Suspicion:
    r"""Suspects workers whose answers are far from the curve through the answers of the others.

    Answers are taken for values of a curve with :math:`g'' = \sqrt{b} \rho^{3/2} \times` white noise, the process whose
    posterior mean is the cubic spline. :math:`\rho` is how many inputs the code lays per unit of length: by that much
    faster does f pass through what it does. With P the precision that this leaves to answers y once the straight line
    has been taken out, worker i's leave-one-out residual is :math:`(Py)_i / P_{ii}` and its variance
    :math:`b / P_{ii}`: large where workers are sparse, for honest ones too. Leaving out a set L as well costs one solve
    of the size of L. Two workers at one node need not agree better than the curve around them could tell; among
    three or more, no better than workers at one node do in the median.

    First a search, from believing everyone, for the set L with the shortest description of all answers

    .. math::
        (n - 2) \log \frac{y^T P_{-L}\, y}{n - |L| - 2} + \sum_{i \in L} \log (1 + z_i^2) + 4 |L|,

    in the mean over outputs and groups, where n workers returned and :math:`z_i` is a suspect's standardised distance
    from the curve through those believed: a Gaussian code for the believed, a heavy-tailed one for suspects. A step
    suspects a run of one to three neighbours among those believed, or clears one suspect, whichever shortens most; so
    liars that back each other up leave together, and honest workers beside a liar come back. Outputs count through the
    logarithm, and none overrules the others.

    Then suspects are cleared again, mildest first, until all are outliers among the believed workers' own residuals:
    each worker's residuals, pooled as the mean of :math:`\log(1 + z^2)`, in units of the median of its ten neighbours'
    and of all (so that where f is rough residuals may be large) must exceed the 70 % quantile extrapolated to 4.5
    standard deviations, and :math:`1.2 \exp(3 / \sqrt{\text{groups}})`, what chance does with few groups.

    Answers that are not numbers are suspected whatever the rest. Nothing here is differentiated: gradients through
    decoded results are those for the mask that was found. Computed in float64, in :math:`O(N^3)` per step.

    Args:
        code: A code that draws a curve through answers at its worker nodes: splines, Berrut, Lagrange.
        answers: Leaves of shape (N, ...), or (groups N, ...) with the groups one after the other, as `coded` has them;
            real. More groups and outputs are more evidence. At most 256 outputs are looked at, spread over all.
        returned: Which workers returned, bool, shape (N,). Answers of the others are not read.
        most: At most this part of those that returned is suspected, two aside.

    Returns:
        The suspicion; a score of 1 is where suspicion begins.

    Raises:
        ValueError: If the code draws no curve, returned is not bool (N,), or a leaf's leading axis is not a multiple of
            N.

    References:
        arXiv 2502.08058 for spline codes against o(N) adversaries; Wahba, Journal of the Royal Statistical Society B 40
        (1978), for the process; Rousseeuw and Leroy, Robust Regression and Outlier Detection (1987), for masking.

    >>> from jaxcode.codes import SplineCode
    >>> code = SplineCode.chebyshev(num_data=10, num_workers=30)
    >>> answers = jnp.sin(code.encode(jnp.linspace(0.0, 3.0, 10))).at[jnp.array([7, 20])].add(1.0)
    >>> jnp.flatnonzero(leave_one_out(code, answers, jnp.ones(30, bool)).suspected).tolist()
    [7, 20]
    """
    _check_curve("leave_one_out", code)
    check_mask("returned", returned, code.num_workers)
    right = finite(answers, returned)
    outputs, groups, precision = _outputs(answers, right)
    least = 1.2 * math.exp(3 / math.sqrt(groups))
    suspected, score = fixed_in_float64(
        lambda *known: find_suspects(*known, precision, most, least),
        code.worker_nodes,
        code.data_nodes,
        outputs,
        right,
    )
    return _report(returned, right, right & ~suspected, score)


def error_locator(
    code: AbstractInterpolatingCode, answers: PyTree[Array], returned: Bool[ArrayLike, "workers"], *, num_liars: int
) -> Suspicion:
    r"""Suspects as many workers as one says lie: the error locator of ApproxIFER.

    For each output, polynomials P of degree K + E - 1 and Q of degree E are fitted such that
    :math:`P(\beta_n) \approx y_n Q(\beta_n)`: where a worker lies Q must vanish. The E workers with the smallest
    :math:`|Q(\beta_n)|` get a vote from each output, and the E workers with the most votes are suspected.

    P and Q are in Chebyshev's basis and Q has unit norm, where the paper has powers and a constant term of 1.

    Args:
        code: As for `leave_one_out`.
        answers: As for `leave_one_out`.
        returned: As for `leave_one_out`.
        num_liars: E >= 1, static. So many are suspected even if none lies. The paper asks for N >= 2K + 2E + S - 1.

    Returns:
        The suspicion; the score is the part of outputs that voted for the worker.

    Raises:
        ValueError: As for `leave_one_out`, or if num_liars is not a whole number of at least 1.

    References:
        arXiv 2109.09868, section 4 and algorithm 2.

    >>> from jaxcode.codes import BerrutCode
    >>> code = BerrutCode.chebyshev(num_data=4, num_workers=16)
    >>> answers = jnp.sin(code.encode(jnp.linspace(0.0, 1.0, 4))).at[5].add(1.0)
    >>> defence = functools.partial(error_locator, num_liars=1)
    >>> jnp.flatnonzero(defence(code, answers, jnp.ones(16, bool)).suspected).tolist()
    [5]
    """
    _check_curve("error_locator", code)
    check_mask("returned", returned, code.num_workers)
    num_liars = check_count("num_liars", num_liars)
    right = finite(answers, returned)
    outputs, _, _ = _outputs(answers, right)
    votes = fixed_in_float64(
        lambda *known: _locate(*known, code.num_data, num_liars), code.worker_nodes, outputs, right
    )
    ranked = jnp.argsort(jnp.argsort(jnp.where(right, -votes, 1)))
    return _report(returned, right, right & (ranked >= num_liars), votes)


def _check_curve(name, code):
    if not isinstance(code, AbstractInterpolatingCode):
        raise ValueError(
            f"code is {code!r}; expected for {name} a code that draws a curve through the answers, such as "
            "SplineCode.repeated(num_data=20, num_workers=30), which contains replication; for others: only_finite"
        )


def _per_worker(answers, returned):
    """Every leaf as (groups, N, features)."""
    workers = np.size(returned)
    check_mask("returned", returned, workers)
    leaves = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(answers):
        if np.ndim(leaf) < 1 or leaf.shape[0] % workers or not leaf.shape[0]:
            name = f"answers{jax.tree_util.keystr(path)}"
            raise ValueError(
                f"{name} has shape {np.shape(leaf)}; expected a leading axis of {workers}, or groups of it"
            )
        leaves.append(jnp.asarray(leaf).reshape(leaf.shape[0] // workers, workers, -1))
    return leaves


def _outputs(answers, right):
    """Some of all outputs of all groups, shape (N, outputs), zero where not right; the groups; and the rounding."""
    leaves = [jax.lax.stop_gradient(leaf) for leaf in _per_worker(answers, right)]
    leaves = [leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.astype(jnp.float32) for leaf in leaves]
    share = max(1, MOST_OUTPUTS // max(1, len(leaves)))
    some = []
    for leaf in leaves:
        rows = jnp.swapaxes(leaf, 0, 1).reshape(leaf.shape[1], -1)
        if rows.shape[1] > share:
            rows = rows[:, np.linspace(0, rows.shape[1] - 1, share).round().astype(np.int32)]
        some.append(rows.astype(jnp.promote_types(rows.dtype, jnp.float32)))
    outputs = jnp.concatenate(some, axis=1) if some else jnp.zeros((*np.shape(right), 0))
    groups = max((leaf.shape[0] for leaf in leaves), default=1)
    precision = max((float(jnp.finfo(leaf.dtype).eps) for leaf in leaves), default=1.0)
    return jnp.where(right[:, None], outputs, 0), groups, precision


def _report(returned, right, believed, score):
    returned = jnp.asarray(returned)
    score = jnp.where(right, score.astype(jnp.float32), jnp.where(returned, jnp.inf, 0))
    return Suspicion(believed, returned & ~believed, score)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _locate(nodes, outputs, live, num_data, num_liars):
    n = len(nodes)
    angle = jnp.arccos(jnp.clip(2 * (nodes - nodes[0]) / (nodes[-1] - nodes[0]) - 1, -1, 1))
    basis = jnp.where(live[:, None], jnp.cos(jnp.arange(min(num_data + num_liars, n)) * angle[:, None]), 0)
    of_numerators, _ = jnp.linalg.qr(basis)
    denominators = jnp.cos(jnp.arange(num_liars + 1) * angle[:, None])

    def vote(y):
        y = y / jnp.maximum(jnp.max(jnp.abs(y)), 1e-60)
        product = y[:, None] * denominators
        # What no numerator explains of Q times the answers.
        product = product - of_numerators @ (of_numerators.T @ product)
        product = jnp.where(live[:, None], product, 0)
        q = jnp.linalg.eigh(product.T @ product)[1][:, 0]
        size = jnp.where(live, jnp.abs(denominators @ q), jnp.inf)
        return (jnp.argsort(jnp.argsort(size)) < num_liars) & live

    return jnp.mean(jax.vmap(vote, 1)(outputs), axis=0) if outputs.shape[1] else jnp.zeros(n)
