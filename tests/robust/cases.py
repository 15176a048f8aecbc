"""Codes, functions and answers on which defences are tested.

All have one size, so that what is compiled for one code serves every other.
"""

import jax.numpy as jnp
import numpy as np

from jaxcode import BerrutCode, SplineCode
from jaxcode.robust import leave_one_out

K, N, GROUPS, OUTPUTS = 10, 40, 8, 3
LAYOUTS = {
    "chebyshev": SplineCode.chebyshev(K, N),
    "systematic": SplineCode.systematic(K, N),
    "repeated": SplineCode.repeated(K, N),
    "berrut": BerrutCode.chebyshev(K, N),
}


def rng(seed=0):
    return np.random.default_rng(seed)


def random_mask(seed, num_missing=6):
    """A mask (N,) of the workers that returned."""
    return ~np.isin(np.arange(N), rng(seed).choice(N, num_missing, replace=False))


def network(x):
    weights = rng(7)
    inner = np.tanh(x @ weights.normal(size=(4, 16)))
    return inner @ weights.normal(size=(16, OUTPUTS))


FUNCTIONS = {
    "network": network,
    "sine": lambda x: np.sin(2 * x[..., :OUTPUTS]),
    "quadratic": lambda x: x[..., :OUTPUTS] ** 2,
    "kinks": lambda x: np.abs(x[..., :OUTPUTS] - 0.3),
    "steps": lambda x: 1.0 * (x[..., :OUTPUTS] > 0.2),
    "rough": lambda x: np.sin(40 * x[..., :OUTPUTS]),
    "constant": lambda x: np.ones_like(x[..., :OUTPUTS]),
    "large-and-small": lambda x: network(x) * np.array([1e8, 1.0, 1e-8]),
    "noise": lambda x: rng(5).normal(size=(*x.shape[:-1], OUTPUTS)),
    "noisy": lambda x: network(x) + 0.05 * rng(5).normal(size=(*x.shape[:-1], OUTPUTS)),
}


def correct_answers(code, f=network):
    """Answers (N, groups, outputs) of f, for random walks of inputs."""
    x = np.cumsum(rng(3).normal(size=(GROUPS, K, 4)), axis=1) / 3 + rng(4).normal(size=(GROUPS, 1, 4))
    return np.asarray(f(np.einsum("nk,gkd->ngd", np.asarray(code.encoder_matrix(), float), x)))


def attacked_answers(code, attack, choose, number, seed, size=6.0):
    """Correct answers, the answers that are sent, the workers that returned, and the faulty ones."""
    answers, returned = correct_answers(code), random_mask(seed)
    faulty = choose(np.flatnonzero(returned), number, rng(seed + 50))
    return answers, attack(answers, faulty, size, rng(seed + 90)), returned, np.sort(faulty)


def choose_anywhere(workers, number, random):
    return random.choice(workers, number, replace=False)


def choose_neighbours(workers, number, random):
    first = random.integers(0, len(workers) - number + 1)
    return workers[first : first + number]


def flagged_workers(code, answers, returned, **options):
    """Indices of the workers that `leave_one_out` flags."""
    return np.flatnonzero(leave_one_out(code, jnp.asarray(answers, jnp.float32), returned, **options).flagged)
