"""Knots, masks, data and errors that the tests of splines and the table of their accuracy share."""

import numpy as np

from jaxcode import nodes

SIZES = (2, 3, 4, 5, 8, 20, 100, 512, 4096)
SMOOTHINGS = (0.0, 1e-12, 1e-9, 1e-6, 1e-4, 1e-2, 1.0, 100.0)


def knots(layout, n, rng):
    return nodes.chebyshev_second(n) if layout == "chebyshev" else np.sort(rng.uniform(-1, 1, n))


def masks(n, rng):
    """Masks that leave from two to all: name -> bool (n,)."""
    third = max(1, n // 3)
    every = np.ones(n, bool)
    index = np.arange(n)

    def drop(where):
        mask = every.copy()
        mask[where] = False
        return mask

    found = {
        "all": every,
        "a random third left out": drop(rng.permutation(n)[:third]),
        "a random half left": ~drop(rng.permutation(n)[: max(2, n // 2)]),
        "the first left out": drop(0),
        "the first third left out": drop(slice(0, third)),
        "the last third left out": drop(slice(n - third, n)),
        "both ends left out": drop((index < third // 2 + 1) | (index >= n - third // 2 - 1)),
        "runs left out": (index // max(1, n // 7)) % 2 == 0,
        "two neighbours left": (index == n // 2) | (index == n // 2 - 1),
        "two far apart left": (index == 0) | (index == n - 1),
        "both ends' pairs left": (index < 2) | (index >= n - 2),
    }
    return {name: mask for name, mask in found.items() if mask.sum() >= 2}


def data(t, rng):
    """Values (n, 3) that float32 holds exactly: noise, a wave with an offset, a straight line far from zero."""
    columns = [rng.normal(size=len(t)), np.sin(3 * t) + 1, 5 + t]
    return np.stack(columns, axis=1).astype(np.float32).astype(np.float64)


def points(t, rng):
    """Where curves are read: data nodes, some knots, random places, and beyond both ends."""
    inside = rng.uniform(-1, 1, 8)
    return np.concatenate([nodes.chebyshev_first(20), t[:: max(1, len(t) // 8)], inside, [-1.2, 1.1]])


def worst_error(estimate, truth):
    """Largest error over largest magnitude, the worst of the columns."""
    estimate, truth = np.asarray(estimate, np.float64), np.asarray(truth, np.float64)
    return float(np.max(np.max(np.abs(estimate - truth), axis=0) / np.max(np.abs(truth), axis=0)))
