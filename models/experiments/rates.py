"""Measures how fast errors fall, beside what was proved: E1, E6 and the theorems.

Each trial draws K inputs, uniform on [-1, 1] and sorted, and stragglers; all arithmetic is in float64. Errors are
squared and averaged over the K inputs. Two functions are computed. `x sin x` is smooth, so its errors fall faster than
bounds for all functions with a square-integrable second derivative. `|x - x_k|^1.6`, with its kink at the middle
input, barely has one (a power of 1.5 has none), so its errors fall nearly as slowly as the bounds allow.

References:
    arXiv 2406.00300 (LeTCC), 2502.00645 (probabilistic stragglers), 2502.08058 (adversarial workers), 2009.08327
    (BACC), 1806.00939 (LCC).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PRNGKeyArray

import jaxcode as jc

from .curves import Curve, summarise

NUM_DATA = 10
SMOOTHINGS = 10.0 ** np.arange(-9, 0.1, 0.5)
_P = ParamSpec("_P")


def _in_float64(measure: Callable[_P, list[Curve]]) -> Callable[_P, list[Curve]]:
    """Runs a function in float64."""

    @functools.wraps(measure)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> list[Curve]:
        with jax.enable_x64(True):
            return measure(*args, **kwargs)

    return wrapped


@_in_float64
def workers(
    trials: int = 2000, seed: int = 0, counts: Sequence[int] = (120, 180, 240, 360, 480), num_stragglers: int = 5
) -> list[Curve]:
    """Measures errors without noise against N at fixed S: proved O(S^3 N^-3), arXiv 2406.00300."""
    stragglers = jc.stragglers.Uniform(num_stragglers)
    return _noiseless("workers", trials, seed, counts, [(count, stragglers) for count in counts], -3.0)


@_in_float64
def stragglers(
    trials: int = 2000, seed: int = 0, counts: Sequence[int] = (5, 10, 20, 40, 80), num_workers: int = 240
) -> list[Curve]:
    """Measures errors without noise against S at fixed N: proved O(S^3 N^-3), arXiv 2406.00300.

    Stragglers are random, or adjacent: the S workers next to the middle input's node, nearly the worst case. There the
    slope may exceed 3: errors proportional to (S/N)^r with r > 3 are below the bound and rise faster in S, and where
    S is not small beside N, a gap is no longer short.
    """
    curves = []
    for attack, draw in (("", jc.stragglers.Uniform), (", adjacent", _Adjacent)):
        points = [(num_workers, draw(count)) for count in counts]
        curves += _noiseless("stragglers", trials, seed, counts, points, 3.0, attack=attack)
    return curves


@_in_float64
def probability(
    trials: int = 2000, seed: int = 0, counts: Sequence[int] = (120, 180, 240, 360, 480), chance: float = 0.1
) -> list[Curve]:
    """Measures errors where each worker straggles with a chance p: proved O(log^3_{1/p}(N) N^-3), arXiv 2502.00645.

    Slopes are those of log(mean / log^3 N). Trials in which fewer than two workers answer are left out.
    """
    points = [(count, jc.stragglers.Independent(chance)) for count in counts]
    return _noiseless("probability", trials, seed, counts, points, -3.0, factor=np.log(counts) ** 3)


@_in_float64
def noise(
    trials: int = 400,
    seed: int = 0,
    counts: Sequence[int] = (30, 60, 120, 240, 480),
    num_stragglers: int = 5,
    sigma: float = 0.1,
) -> list[Curve]:
    """Measures errors against N where answers have noise: proved O(S^{8/5} N^{-3/5}), arXiv 2406.00300."""
    stragglers = jc.stragglers.Uniform(num_stragglers)
    samples = {name: [] for name in ("LeTCC", "LeTCC, unsmoothed", "BACC")}
    for count in counts:
        key, x, returned = _draw(seed, count, trials, count, stragglers)
        noise = sigma * jax.random.normal(jax.random.fold_in(key, 1), (trials, count))
        spline, berrut = (_errors_of(name, NUM_DATA, count) for name in ("LeTCC", "BACC"))
        best, unsmoothed = _smoothed(lambda lam, spline=spline, args=(x, returned, noise): spline(*args, smoothing=lam))
        for name, errors in zip(samples, (best, unsmoothed, berrut(x, returned, noise)[1::2]), strict=True):
            samples[name].append(errors)
    return summarise("noise", samples, counts, -3 / 5, seed)


@_in_float64
def adversaries(
    trials: int = 400,
    seed: int = 0,
    exponent: float = 0.5,
    counts: Sequence[int] = (100, 196, 400, 784, 1600),
    bound: float = 3.0,
) -> list[Curve]:
    """Measures errors against N where N^a workers are adversarial: proved O(N^{6/5 (a-1)}), arXiv 2502.08058.

    Nobody straggles. Answers lie in [-M, M]. Adversaries are either the workers next to the middle input's node, which
    all answer M, or spread at random, with answers uniform on [-M, M]. Adjacent ones nearly attain the bound, so that a
    slope cannot be told from it.

    Args:
        trials: Sets of inputs and of adversaries.
        seed: For the draws.
        exponent: a in (0, 1).
        counts: N; N^a is rounded.
        bound: M.
    """
    attacks = ("adjacent", "scattered")
    samples = {f"{name}, {attack}": [] for attack in attacks for name in ("LeTCC", "LeTCC, unsmoothed", "BACC")}
    for count in counts:
        key, x, _ = _draw(seed, count, trials, count, jc.stragglers.Uniform(0))
        size = round(count**exponent)
        adjacent = jnp.broadcast_to(_adjacent(NUM_DATA, count, size), (trials, count))
        keys = jax.random.split(jax.random.fold_in(key, 1), 2)
        rank = jnp.argsort(jax.random.uniform(keys[0], (trials, count)), axis=1)
        false = jax.random.uniform(keys[1], (trials, count), minval=-bound, maxval=bound)
        spline, berrut = (_errors_of(name, NUM_DATA, count) for name in ("LeTCC", "BACC"))
        for attack, replaced, answers in (
            ("adjacent", adjacent, jnp.full((trials, count), bound)),
            ("scattered", rank < size, false),
        ):
            args = x, jnp.ones(count, bool), jnp.where(replaced, answers, 0), replaced
            best, unsmoothed = _smoothed(lambda lam, spline=spline, args=args: spline(*args, smoothing=lam))
            samples[f"LeTCC, {attack}"].append(best)
            samples[f"LeTCC, unsmoothed, {attack}"].append(unsmoothed)
            samples[f"BACC, {attack}"].append(berrut(*args)[1::2])
    return summarise(f"adversaries {exponent}", samples, counts, 6 / 5 * (exponent - 1), seed)


@_in_float64
def polynomials(
    trials: int = 2000,
    seed: int = 0,
    counts: Sequence[int] = tuple(range(16)),
    degree: int = 3,
    num_data: int = 5,
    num_workers: int = 20,
) -> list[Curve]:
    """Measures errors of Lagrange coding and LeTCC on random polynomials against S: E6 of arXiv 2406.00300."""
    samples = {"LCC": [], "LeTCC": []}
    for count in counts:
        key, x, returned = _draw(seed, count, trials, num_workers, jc.stragglers.Uniform(count), num_data)
        coefficients = jax.random.normal(jax.random.fold_in(key, 1), (trials, degree + 1))
        for name, errors in samples.items():
            errors_of = _errors_of(name, num_data, num_workers, degree)
            errors.append(errors_of(x, returned, jnp.zeros(returned.shape), coefficients=coefficients))
    return summarise(f"polynomials {degree}", samples, counts, None, seed, functions=(f"degree {degree}",))


def _noiseless(statement, trials, seed, x, points, bound, factor=None, attack="") -> list[Curve]:
    """Measures LeTCC and BACC at points (N, stragglers); an attack is added to their names."""
    samples = {"LeTCC": [], "BACC": []}
    for value, (count, stragglers) in zip(x, points, strict=True):
        _, inputs, returned = _draw(seed, value, trials, count, stragglers)
        is_enough = np.asarray(returned.sum(axis=1) >= 2)
        for name, errors in samples.items():
            errors_of = _errors_of(name, NUM_DATA, count)
            errors.append(errors_of(inputs, returned, jnp.zeros(returned.shape))[is_enough])
    samples = {name + attack: errors for name, errors in samples.items()}
    return summarise(statement, samples, x, bound, seed, factor)


def _adjacent(num_data: int, num_workers: int, size: int) -> Bool[np.ndarray, "workers"]:
    """Finds the workers next to the middle input's node."""
    nodes = jc.nodes.chebyshev(num_data, num_workers)
    distance = abs(nodes.workers - nodes.data[num_data // 2])
    return np.argsort(np.argsort(distance)) < size


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Adjacent(jc.stragglers.AbstractStragglers):
    """Draws always the same stragglers: the workers next to the middle of `NUM_DATA` inputs' nodes."""

    num_stragglers: int

    def sample(self, key: PRNGKeyArray, num_workers: int) -> Bool[Array, "workers"]:
        del key
        return jnp.asarray(~_adjacent(NUM_DATA, num_workers, self.num_stragglers))


def _smoothed(errors_of: Callable[[float], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Computes errors at each function's best smoothing, chosen by every other trial, and, of the rest, at none."""
    errors = np.stack([errors_of(smoothing) for smoothing in SMOOTHINGS])
    best = errors[:, ::2].mean(axis=1).argmin(axis=0)
    chosen = np.stack([errors[index, 1::2, i] for i, index in enumerate(best)], axis=-1)
    return chosen, errors_of(0.0)[1::2]


@functools.partial(jax.jit, static_argnames=("trials", "num_workers", "num_data"))
def _draw(seed, point, trials, num_workers, stragglers, num_data=NUM_DATA):
    """Draws a point's key, ascending inputs, (trials, K), and masks of workers that returned, (trials, N)."""
    key = jax.random.fold_in(jax.random.key(seed), point)
    keys = jax.random.split(key, 2)
    sample = jax.vmap(lambda trial_key: stragglers.sample(trial_key, num_workers=num_workers))
    x = jnp.sort(jax.random.uniform(keys[0], (trials, num_data), minval=-1.0))
    return key, x, sample(jax.random.split(keys[1], trials))


@functools.cache
def _errors_of(scheme: str, num_data: int, num_workers: int, degree: int | None = None):
    """Builds the function that computes every trial's mean squared errors, once for each code.

    Workers compute `FUNCTIONS`, or polynomials of a degree where one is given.
    """
    nodes = jc.nodes.chebyshev(num_data, num_workers)

    def build(smoothing):
        if scheme == "LeTCC":
            return jc.SplineCode(nodes.data, nodes.workers, decoder_smoothing=smoothing)
        if scheme == "BACC":
            return jc.BerrutCode(nodes.data, nodes.workers)
        return jc.LagrangeCode(nodes.data, nodes.workers, degree=degree or 1)

    def f(parameters, z):
        if degree is None:
            return jnp.stack([z * jnp.sin(z), jnp.abs(z - parameters) ** 1.6], axis=-1)
        return jnp.polyval(parameters, z)[:, None]

    encoder = np.asarray(build(0.0).encoder_matrix())

    @jax.jit
    def squared_errors(parameters, x, coded, returned, added, replaced, smoothing):
        def squared_error(parameters, x, coded, returned, added, replaced):
            answers = jnp.where(replaced[:, None], 0.0, f(parameters, coded)) + added[:, None]
            return jnp.mean((build(smoothing).decode(answers, returned) - f(parameters, x)) ** 2, axis=0)

        # Trials that share one mask share one matrix, which is computed once.
        axes = (0, 0, 0, 0 if returned.ndim == 2 else None, 0, 0)
        return jax.vmap(squared_error, axes)(parameters, x, coded, returned, added, replaced)

    def errors(x, returned, added, replaced=None, coefficients=None, smoothing=0.0) -> np.ndarray:
        """Computes errors (trials, functions); `added` is added to answers, or replaces those that are `replaced`."""
        coded = x @ encoder.T
        replaced = jnp.zeros(added.shape, bool) if replaced is None else replaced
        parameters = x[:, num_data // 2] if coefficients is None else coefficients
        return np.asarray(squared_errors(parameters, x, coded, returned, added, replaced, jnp.float64(smoothing)))

    return errors
