"""Surrogates: cheap models of a model, distilled from its answers, which are the decoder's prior."""

from .distil import surrogate as surrogate
from .learner import Learner as Learner
from .predictors import Surrogate as Surrogate
from .predictors import load_surrogate as load_surrogate

__all__ = ["Learner", "Surrogate", "load_surrogate", "surrogate"]
