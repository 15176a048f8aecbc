"""Defines problems whose optimum scikit-learn computes."""

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge


def classes(n, d, seed=0, groups=8):
    """Returns samples of length 1, sorted by groups that differ in their means, and labels, -1 or 1."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) + rng.normal(size=(groups, d))[np.arange(n) * groups // n]
    y = np.where(3 * x @ rng.normal(size=d) / np.sqrt(d) + rng.normal(size=n) > 0, 1.0, -1.0)
    return x / np.linalg.norm(x, axis=1, keepdims=True), y


def shuffle(data, seed=0):
    """Permutes samples at random, so that machines have similar ones."""
    order = np.random.default_rng(seed).permutation(len(data[1]))
    return tuple(part[order] for part in data)


def logistic_optimum(x, y, ridge):
    """Computes the optimum by scikit-learn's Newton method."""
    model = LogisticRegression(
        C=1 / (ridge * len(y)), fit_intercept=False, solver="newton-cholesky", tol=1e-14, max_iter=200
    )
    return model.fit(x, y).coef_[0]


def logistic_objective(w, x, y, ridge):
    return np.mean(np.logaddexp(0, -y * (x @ w))) + ridge / 2 * w @ w


def squares_optimum(x, y, ridge):
    return Ridge(alpha=ridge * len(y), fit_intercept=False, tol=1e-14).fit(x, y).coef_


def distance(params, optimum):
    """Returns the squared distance from the optimum, in units of that of zero."""
    return float(np.sum((np.asarray(params) - optimum) ** 2) / np.sum(optimum**2))
