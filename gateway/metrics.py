"""What the front counts, and how Prometheus sees it.

Counting happens on the way of every token, so that it is plain arithmetic; names and labels are made when
somebody scrapes. Each figure appears under a name of ours and, where clients key on it, under vLLM's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest

from gateway.fault_metrics import FaultMetrics
from gateway.histogram import Histogram
from gateway.journal import Journal
from gateway.protocol import Stats

TOKEN_BUCKETS_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.2,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
)
REQUEST_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)


class FrontMetrics:
    """Counters and histograms of the front, and the engine's last words about itself."""

    def __init__(self, model: str) -> None:
        self.model = self._model = model
        self.accepted = 0
        self.refused: Counter[str] = Counter()
        """By error code."""
        self.finished: Counter[str] = Counter()
        """By finish reason; "error" for requests that failed."""
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.replays = 0
        self.position_errors = 0
        self.trials: Counter[str] = Counter({"acquitted": 0, "failed": 0})
        """Of requests that may be what kills worlds, by verdict."""
        self.faults = FaultMetrics(model)
        self.http_responses: Counter[int] = Counter()
        self.live = 0
        """Requests accepted and not ended."""
        self.journal: Journal | None = None
        self.serving_epoch: int | None = None
        self.stats: Stats | None = None
        self.time_to_first_token = Histogram(REQUEST_BUCKETS_S)
        self.inter_token_latency = Histogram(TOKEN_BUCKETS_S)
        self.request_latency = Histogram(REQUEST_BUCKETS_S)
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        self._registry.register(self)

    def exposition(self) -> bytes:
        """The text that Prometheus reads (text/plain; version=0.0.4)."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        yield from self._counters()
        yield from self._gauges()
        yield from self.faults.collect()
        names = {
            "time_to_first_token_seconds": ("From acceptance to the first token.", self.time_to_first_token),
            "inter_token_latency_seconds": ("Between tokens of a request.", self.inter_token_latency),
            "e2e_request_latency_seconds": ("From acceptance to the end.", self.request_latency),
        }
        for name, (text, histogram) in names.items():
            for prefix in ("phalanx_", "vllm:"):
                family = HistogramMetricFamily(prefix + name, text, labels=self._labels(prefix))
                family.add_metric(self._values(prefix), histogram.buckets(), histogram.total)
                yield family
        if self.journal is not None and self.journal.write_seconds is not None:
            writes = self.journal.write_seconds
            text = "Commits of the journal, each before a client sees what is in it."
            family = HistogramMetricFamily("phalanx_journal_write_seconds", text, labels=["model"])
            family.add_metric([self._model], writes.buckets(), writes.total)
            yield family

    def _counters(self) -> Iterator[Metric]:
        stats = self.stats
        both = {
            "prompt_tokens": ("Prompt tokens of accepted requests.", self.prompt_tokens),
            "generation_tokens": ("Tokens delivered.", self.generation_tokens),
            "num_preemptions": (
                "Requests that the active world's scheduler put back.",
                stats.num_preemptions if stats else 0,
            ),
            "prefix_cache_queries": (
                "Prompt tokens that the active world looked up in its prefix cache.",
                stats.prefix_cache_queries if stats else 0,
            ),
            "prefix_cache_hits": (
                "Prompt tokens that the active world found there.",
                stats.prefix_cache_hits if stats else 0,
            ),
        }
        for name, (text, value) in both.items():
            for prefix in ("phalanx_", "vllm:"):
                yield self._counter(prefix, name, text, value)
        own = {
            "requests_accepted": ("Requests accepted.", self.accepted),
            "replays": ("Requests submitted again to another world.", self.replays),
            "journal_errors": (
                "Failed attempts to write the journal.",
                self.journal.num_errors if self.journal is not None else 0,
            ),
            "position_errors": ("Outputs with a repeated or a missing position.", self.position_errors),
        }
        for name, (text, value) in own.items():
            yield self._counter("phalanx_", name, text, value)
        for prefix, name, label in (
            ("phalanx_", "requests_finished", "finish_reason"),
            ("vllm:", "request_success", "finished_reason"),
        ):
            family = CounterMetricFamily(
                prefix + name, "Requests ended, by reason.", labels=[*self._labels(prefix), label]
            )
            for reason in ("stop", "length", "cancelled", "error"):
                if prefix == "vllm:":
                    if reason == "error":
                        continue
                    reason_label = "abort" if reason == "cancelled" else reason
                else:
                    reason_label = reason
                family.add_metric([*self._values(prefix), reason_label], self.finished[reason])
            yield family
        refused = CounterMetricFamily(
            "phalanx_requests_refused", "Requests not accepted, by code.", labels=["model", "code"]
        )
        for code, count in self.refused.items():
            refused.add_metric([self._model, code], count)
        yield refused
        trials = CounterMetricFamily(
            "phalanx_quarantine_trials", "Requests tried alone, by verdict.", labels=["model", "verdict"]
        )
        for verdict, count in self.trials.items():
            trials.add_metric([self._model, verdict], count)
        yield trials
        responses = CounterMetricFamily("phalanx_http_responses", "HTTP responses.", labels=["status"])
        for status, count in sorted(self.http_responses.items()):
            responses.add_metric([str(status)], count)
        yield responses

    def _gauges(self) -> Iterator[Metric]:
        stats = self.stats
        running = stats.num_running if stats else 0
        blocks_used, blocks_total = (stats.kv_blocks_used, stats.kv_blocks_total) if stats else (0, 0)
        waiting = max(self.live - running, 0)
        usage = blocks_used / blocks_total if blocks_total else 0.0
        both: dict[str, tuple[str, float]] = {
            "num_requests_running": ("Requests in the running batch.", running),
            "num_requests_waiting": ("Requests accepted and not running.", waiting),
            "kv_cache_usage_perc": ("Share of KV blocks in use, 0 to 1.", usage),
        }
        for name, (text, value) in both.items():
            for prefix in ("phalanx_", "vllm:"):
                yield self._gauge(prefix, name, text, value)
        journal = self.journal
        own: dict[str, tuple[str, float]] = {
            "journal_failing": (
                "1 while the journal cannot be written: new requests are refused, accepted ones go on.",
                int(journal is not None and journal.failing is not None),
            ),
            "journal_bytes": (
                "Size of the journal's file and its log; 0 without one.",
                journal.size_bytes() if journal is not None else 0,
            ),
            "kv_blocks_used": ("KV blocks in use.", blocks_used),
            "kv_blocks_total": ("KV blocks of the active world.", blocks_total),
            "requests_live": ("Requests accepted and not ended.", self.live),
            "serving_epoch": ("Epoch of the world that serves; 0 while none does.", self.serving_epoch or 0),
        }
        for name, (text, value) in own.items():
            yield self._gauge("phalanx_", name, text, value)

    def _counter(self, prefix: str, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(prefix + name, text, labels=self._labels(prefix))
        family.add_metric(self._values(prefix), value)
        return family

    def _gauge(self, prefix: str, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(prefix + name, text, labels=self._labels(prefix))
        family.add_metric(self._values(prefix), value)
        return family

    def _labels(self, prefix: str) -> list[str]:
        return ["model_name", "engine"] if prefix == "vllm:" else ["model"]

    def _values(self, prefix: str) -> list[str]:
        return [self._model, "0"] if prefix == "vllm:" else [self._model]
