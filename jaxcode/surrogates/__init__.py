"""Surrogates: cheap models of a model, distilled from its answers, which are the decoder's prior."""

from .distil import surrogate as surrogate
from .predictors import Surrogate as Surrogate
from .predictors import load_surrogate as load_surrogate

__all__ = ["Surrogate", "load_surrogate", "surrogate"]
