"""Ridge regression whose ridge is chosen by leaving out one row at a time, in closed form."""

import dataclasses
from typing import final

import numpy as np
from jaxtyping import Float

_RIDGES = 10.0 ** np.arange(-10, 3)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class RidgeFit:
    """Holds a fitted linear map.

    Attributes:
        weights: Of the features, (features, outputs).
        offset: Added to the products, (outputs,).
        left_out: What is predicted for each row by a fit to all others, (rows, outputs).
        ridge: The ridge chosen, relative to the mean of the Gram matrix's diagonal.
    """

    weights: Float[np.ndarray, "features outputs"]
    offset: Float[np.ndarray, "outputs"]
    left_out: Float[np.ndarray, "rows outputs"]
    ridge: float


def fit_ridge(features: Float[np.ndarray, "rows features"], targets: Float[np.ndarray, "rows outputs"]) -> RidgeFit:
    r"""Fits a ridge regression with an offset that is not penalised.

    .. math:: \min_W \|Z W - Y\|^2 + \lambda \|W\|^2

    Features are standardised. With :math:`Z = U \Sigma V^T` and leverages
    :math:`h_i = \frac1n + \sum_j U_{ij}^2 \sigma_j^2 / (\sigma_j^2 + \lambda)`, the residual of a row that is left out
    is :math:`(y_i - \hat y_i) / (1 - h_i)`; the ridge whose mean square is least, each output in units of its
    variance, is chosen. The decomposition is that of the smaller Gram matrix.

    Args:
        features: At least two rows.
        targets: As many rows.

    References:
        Allen, Technometrics 16 (1974) (PRESS); Hastie, Tibshirani and Friedman, The Elements of Statistical Learning,
        section 7.10.
    """
    features, targets = np.asarray(features, np.float64), np.asarray(targets, np.float64)
    num_rows = len(features)
    feature_mean, scale = features.mean(axis=0), features.std(axis=0)
    # A constant feature has no weight.
    scale = np.where(scale > 1e-9 * (abs(feature_mean) + 1e-30), scale, np.inf)
    mean = targets.mean(axis=0)
    standard, centred = (features - feature_mean) / scale, targets - mean
    is_tall = num_rows >= standard.shape[1]
    squares, vectors = np.linalg.eigh(standard.T @ standard if is_tall else standard @ standard.T)
    unit = max(num_rows, 1)
    is_kept = squares > 1e-13 * max(squares.max(), 1e-300)
    squares, vectors = squares[is_kept], vectors[:, is_kept]
    left = standard @ vectors / np.sqrt(squares) if is_tall else vectors
    projected = left.T @ centred
    variance = centred.var(axis=0)
    variance = np.where(variance > 0, variance, 1.0)

    def leave_out(ridge):
        shrinkage = squares / (squares + ridge)
        leverage = np.minimum(1 / num_rows + (left**2) @ shrinkage, 1 - 1e-9)
        residual = (centred - left @ (shrinkage[:, None] * projected)) / (1 - leverage)[:, None]
        return residual

    ridges = _RIDGES * unit * standard.shape[1]
    scores = [np.mean(leave_out(ridge) ** 2 / variance) for ridge in ridges]
    best = int(np.argmin(scores))
    coefficients = (np.sqrt(squares) / (squares + ridges[best]))[:, None] * projected
    rotated = vectors @ coefficients if is_tall else standard.T @ (vectors @ (coefficients / np.sqrt(squares)[:, None]))
    weights = rotated / scale[:, None]
    return RidgeFit(weights, mean - feature_mean @ weights, targets - leave_out(ridges[best]), float(_RIDGES[best]))
