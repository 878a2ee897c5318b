"""What Prometheus is told at /metrics: counters of the requests, the queue, the model's experts, and this process."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cacheroute.engine.stats import Stats
from cacheroute.serve.worker import Report

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)


class Metrics:
    """`stats`: the model's counters now. Those of experts are of the time when the last answer ended: a model may be asked by one
    thread at a time."""

    def __init__(self, stats: Stats) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("cacheroute_requests", "HTTP requests answered.", ["path", "status"], registry=registry)
        self.waiting = Gauge("cacheroute_requests_waiting", "Requests in the queue.", registry=registry)
        self.running = Gauge("cacheroute_requests_running", "Answers being computed: 0 or 1.", registry=registry)
        self._answers = Counter("cacheroute_answers", "Answers begun, by how they ended.", ["finish_reason"], registry=registry)
        self._prompt = Counter("cacheroute_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._evaluated = Counter(
            "cacheroute_prompt_tokens_evaluated", "Those that were not evaluated before.", registry=registry
        )
        self._generated = Counter("cacheroute_generated_tokens", "Tokens generated.", registry=registry)
        self._queue = Histogram("cacheroute_queue_seconds", "Time in the queue.", buckets=_SECONDS, registry=registry)
        self._first = Histogram(
            "cacheroute_first_token_seconds", "Time from its turn to its first token.", buckets=_SECONDS, registry=registry
        )
        self._experts = _Experts(stats)
        registry.register(self._experts)
        ProcessCollector(registry=registry)

    def answered(self, report: Report) -> None:
        """Counts an answer. Called by the computing thread."""
        run = report.run
        self._experts.stats = report.after
        self._answers.labels(report.finish_reason).inc()
        self._prompt.inc(len(run.prompt.tokens))
        self._evaluated.inc(max((report.after.prefill - report.before.prefill).tokens, 0))
        self._generated.inc(run.n_tokens)
        self._queue.observe(report.waited)
        if run.first:
            self._first.observe(run.first - run.started)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _Experts(Collector):
    def __init__(self, stats: Stats) -> None:
        self.stats = stats

    def collect(self) -> Iterator[Metric]:
        s = self.stats
        phases = {"prompt": s.prefill, "decode": s.decode}
        for name, what in (
            ("hits", "Experts that were in memory when a token chose them."),
            ("misses", "Experts that a token chose and that had to be read."),
            ("swapped", "Experts that ran in place of the model's own choice."),
            ("dropped", "Experts that were chosen and did not run."),
            ("read_bytes", "Bytes of experts asked of the device."),
        ):
            family = CounterMetricFamily(f"cacheroute_expert_{name}", what, labels=["phase"])
            for phase, counters in phases.items():
                family.add_metric([phase], getattr(counters, name))
            yield family
        yield GaugeMetricFamily("cacheroute_resident_bytes", "Bytes of experts in memory.", value=s.resident_bytes)
        yield GaugeMetricFamily("cacheroute_budget_bytes", "The most that they may be.", value=s.budget_bytes)
