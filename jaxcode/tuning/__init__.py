"""Choosing a code for a model: from samples of its inputs, from the nodes' geometry, from the answers themselves."""

from ..splines.cross_validation import gcv_score as gcv_score
from ..splines.cross_validation import gcv_smoothing as gcv_smoothing
from .evaluation import disagreement as disagreement
from .evaluation import squared_error as squared_error
from .optimise import optimise_nodes as optimise_nodes
from .report import Candidate as Candidate
from .report import Tuned as Tuned
from .search import standard_layouts as standard_layouts
from .search import standard_orders as standard_orders
from .search import tune as tune
