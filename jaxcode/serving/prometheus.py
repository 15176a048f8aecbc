"""A server's counters in Prometheus' format."""

import collections

try:
    from prometheus_client import REGISTRY
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.registry import Collector
except ImportError as problem:
    raise ImportError("metrics need prometheus-client: pip install 'jaxcode[metrics]'") from problem


def register(server, pool, registry=None) -> None:
    """Has the registry, the default one if none is given, read the counters whenever it is read itself."""
    (REGISTRY if registry is None else registry).register(_Counters(server, pool))


class _Counters(Collector):
    def __init__(self, server, pool):
        self._server, self._pool = server, pool

    def collect(self):
        counters = self._server.counters()
        requests = CounterMetricFamily("jaxcode_requests", "Requests, by what became of them.", labels=["outcome"])
        for outcome in ("answered", "refused"):
            requests.add_metric([outcome], counters[outcome])
        yield requests
        yield CounterMetricFamily(
            "jaxcode_stragglers", "Workers that answered requests were not waited for.", value=counters["stragglers"]
        )
        latency = HistogramMetricFamily("jaxcode_latency_seconds", "From request to answer.")
        bounds = [("+Inf" if bound == float("inf") else str(bound), n) for bound, n in counters["latency"].items()]
        latency.add_metric([], bounds, counters["latency_sum"])
        yield latency
        events = CounterMetricFamily("jaxcode_worker_events", "What happened to workers.", labels=["event"])
        for event, number in counters["workers"].items():
            events.add_metric([event], number)
        yield events
        workers = GaugeMetricFamily("jaxcode_workers", "Workers, by what they are doing.", labels=["state"])
        states = collections.Counter(self._pool.states())
        for state in ("idle", "busy", "starting", "resting"):
            workers.add_metric([state], states[state])
        yield workers

    def describe(self):
        return []
