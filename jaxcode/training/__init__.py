"""Trains codes and priors through the decoder: on the loss of what is decoded under stragglers."""

from .refine import Refined as Refined
from .refine import refine as refine

__all__ = ["Refined", "refine"]
