"""Counts the requests of a server, by outcome and latency."""

import bisect
import threading
from typing import Any, final

import numpy as np

# Upper ends of the latency histogram's buckets, in seconds.
LATENCY_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@final
class Counters:
    """Counts requests from several threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._outcomes = {"answered": 0, "refused": 0, "rejected": 0}
        self._stragglers = 0
        self._latency_sum = 0.0
        self._latency = [0] * (len(LATENCY_BOUNDS) + 1)

    def count_answered(self, latency: float, stragglers: int) -> None:
        """Counts an answered request, its latency in seconds and the number of coded inputs it did not wait for."""
        with self._lock:
            self._outcomes["answered"] += 1
            self._stragglers += stragglers
            self._latency_sum += latency
            self._latency[bisect.bisect_left(LATENCY_BOUNDS, latency)] += 1

    def count_refused(self) -> None:
        """Counts a request that was refused, as too few answers came."""
        with self._lock:
            self._outcomes["refused"] += 1

    def count_rejected(self) -> None:
        """Counts a request that was rejected, as the queue was full."""
        with self._lock:
            self._outcomes["rejected"] += 1

    def snapshot(self) -> dict[str, Any]:
        """Returns the counters as `CodedServer.counters` describes them."""
        with self._lock:
            cumulative = np.cumsum(self._latency).tolist()
            return {
                **self._outcomes,
                "stragglers": self._stragglers,
                "latency": dict(zip((*LATENCY_BOUNDS, np.inf), cumulative, strict=True)),
                "latency_sum": self._latency_sum,
            }
