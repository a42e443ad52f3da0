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
from gateway.protocol import Limits, Stats
from gateway.request_metrics import LATENCY_BUCKETS_S, PER_TOKEN_BUCKETS_S, RequestMetrics
from gateway.world_metrics import EngineTotals, Table, collect_worlds

TOKEN_BUCKETS_S = tuple(sorted({*PER_TOKEN_BUCKETS_S, 0.001, 0.0025, 0.005, 0.02, 0.03, 30.0}))
FIRST_TOKEN_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
REQUEST_BUCKETS_S = tuple(sorted({*LATENCY_BUCKETS_S, 0.01, 0.025, 0.05, 0.1}))
"""vLLM's bounds, and some of ours between them."""


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
        self.limits: Limits | None = None
        """Of the last world."""
        self.worlds: Table | None = None
        self.engine = EngineTotals()
        self.per_request = RequestMetrics()
        self.time_to_first_token = Histogram(FIRST_TOKEN_BUCKETS_S)
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
        yield from self.per_request.collect(self._labels, self._values)
        if self.worlds is not None:
            yield from collect_worlds(self.worlds, self._model)
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

    def note_stats(self, stats: Stats) -> None:
        """What the world that serves says of itself."""
        self.stats = stats
        self.engine.note(stats)

    def _cache_info(self) -> Metric:
        """As vLLM's, whose sizes autoscalers and routers multiply."""
        blocks = self.stats.kv_blocks_total if self.stats is not None else 0
        tokens = self.limits.kv_cache_tokens if self.limits is not None else 0
        labels = ["block_size", "num_gpu_blocks", "enable_prefix_caching"]
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "Sizes of the KV cache.", labels=[*self._labels("vllm:"), *labels]
        )
        size = tokens // blocks if blocks else 0
        family.add_metric([*self._values("vllm:"), str(size), str(blocks), "True"], 1)
        return family

    def _counters(self) -> Iterator[Metric]:
        engine = self.engine
        both = {
            "prompt_tokens": ("Prompt tokens of accepted requests.", self.prompt_tokens),
            "generation_tokens": ("Tokens delivered.", self.generation_tokens),
            "num_preemptions": (
                "Requests that worlds' schedulers put back.",
                engine["num_preemptions"],
            ),
            "prefix_cache_queries": (
                "Prompt tokens that worlds looked up in their prefix caches.",
                engine["prefix_cache_queries"],
            ),
            "prefix_cache_hits": (
                "Prompt tokens that worlds found there.",
                engine["prefix_cache_hits"],
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
        yield self._cache_info()
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
