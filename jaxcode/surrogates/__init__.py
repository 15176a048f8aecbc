"""Surrogates: cheap models of a model, distilled from its answers, which are the decoder's prior."""

from .distil import surrogate as surrogate
from .predictors import Surrogate as Surrogate

__all__ = ["Surrogate", "surrogate"]
