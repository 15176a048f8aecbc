"""Exports a server's counters in Prometheus' format."""

import collections
from typing import final

from ..pools.supervisor import STATES

try:
    from prometheus_client import REGISTRY
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.registry import Collector
except ImportError as problem:
    raise ImportError("metrics need prometheus-client: pip install 'jaxcode[metrics]'") from problem

__all__ = ["register"]


def register(server, pool, registry=None) -> None:
    """Registers a server's counters, which are read whenever the registry is collected.

    Args:
        server: The `CodedServer`.
        pool: Its pool.
        registry: A `prometheus_client` registry; its default one if not given.
    """
    (REGISTRY if registry is None else registry).register(_ServerCollector(server, pool))


@final
class _ServerCollector(Collector):
    """Reads the counters of a server and the states of its workers."""

    def __init__(self, server, pool):
        self._server, self._pool = server, pool

    def collect(self):
        counters = self._server.counters()
        requests = CounterMetricFamily("jaxcode_requests", "Requests, by outcome.", labels=["outcome"])
        for outcome in ("answered", "refused", "rejected"):
            requests.add_metric([outcome], counters[outcome])
        yield requests
        yield CounterMetricFamily(
            "jaxcode_stragglers", "Coded inputs that answered requests did not wait for.", value=counters["stragglers"]
        )
        latency = HistogramMetricFamily(
            "jaxcode_latency_seconds", "From the submission of a request to its prediction."
        )
        bounds = [("+Inf" if bound == float("inf") else str(bound), n) for bound, n in counters["latency"].items()]
        latency.add_metric([], bounds, counters["latency_sum"])
        yield latency
        events = CounterMetricFamily("jaxcode_worker_events", "Events of workers, by kind.", labels=["event"])
        for event, number in counters["workers"].items():
            events.add_metric([event], number)
        yield events
        if prior := counters.get("prior"):
            learned = CounterMetricFamily("jaxcode_prior_events", "Events of the prior's learner.", labels=["event"])
            for event in ("observed", "rounds", "improved"):
                learned.add_metric([event], prior[event])
            yield learned
            yield GaugeMetricFamily(
                "jaxcode_prior_squared_error",
                "Of guesses for answers not learned from, over the answers' variance.",
                value=prior["squared_error"],
            )
        workers = GaugeMetricFamily("jaxcode_workers", "Workers, by state.", labels=["state"])
        states = collections.Counter(self._pool.states())
        for state in STATES:
            workers.add_metric([state], states[state])
        yield workers

    def describe(self):
        return []
