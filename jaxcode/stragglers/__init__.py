"""Models of stragglers: random masks and latencies, sampled under jit.

A model of stragglers draws a mask over the workers, True where a worker's answer returned. `Uniform` and `Independent`
draw the mask itself; `FirstToAnswer` and `Deadline` draw each worker's latency in seconds and the end of the wait
decides who returned.

Every model is a frozen dataclass and a pytree. Its parameters are leaves: they may be traced, batched with `jax.vmap`
and, for latencies, differentiated; only what fixes a shape is static. Arguments are checked where the host knows their
values. The same key gives the same draw.
"""

from .latency import AbstractLatency, CorrelatedByHost, Empirical, LogNormal, Pareto, ShiftedExponential
from .masks import AbstractStragglers, Deadline, FirstToAnswer, Independent, Uniform

__all__ = [
    "AbstractLatency",
    "AbstractStragglers",
    "CorrelatedByHost",
    "Deadline",
    "Empirical",
    "FirstToAnswer",
    "Independent",
    "LogNormal",
    "Pareto",
    "ShiftedExponential",
    "Uniform",
]
