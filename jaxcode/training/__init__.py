"""Trains codes and priors through the decoder: on the loss of what is decoded under stragglers."""

from .refinement import Refined as Refined
from .refinement import refine as refine

__all__ = ["Refined", "refine"]
