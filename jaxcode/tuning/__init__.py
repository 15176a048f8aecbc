"""Chooses the code for a model by measurement on a sample of its inputs, or improves one by moving worker nodes."""

from .losses import disagreement as disagreement
from .losses import squared_error as squared_error
from .optimise import optimise_nodes as optimise_nodes
from .report import Candidate as Candidate
from .report import Tuned as Tuned
from .report import load_tuned as load_tuned
from .search import kernel_layouts as kernel_layouts
from .search import standard_layouts as standard_layouts
from .search import standard_orders as standard_orders
from .search import tune as tune

__all__ = [
    "Candidate",
    "Tuned",
    "disagreement",
    "kernel_layouts",
    "load_tuned",
    "optimise_nodes",
    "squared_error",
    "standard_layouts",
    "standard_orders",
    "tune",
]
