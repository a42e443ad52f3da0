"""How long ended requests took, part by part, and how large they were. Fed by requests.py once a request, part of
what metrics.py shows, under our names and vLLM's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import HistogramMetricFamily, Metric

from gateway.histogram import Histogram
from gateway.live_request import Request

LATENCY_BUCKETS_S: tuple[float, ...] = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
PER_TOKEN_BUCKETS_S: tuple[float, ...] = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
COUNT_BUCKETS = tuple(float(digit * 10**power) for power in range(7) for digit in (1, 2, 5))
"""Bounds as vLLM has them, so that what was made for it draws the same."""

_SECONDS = {
    "request_queue_time_seconds": "From acceptance until a world had the request, a world's own queue not included.",
    "request_prefill_time_seconds": "From there to the first token, with the world's own queue.",
    "request_decode_time_seconds": "From the first to the last token, with the recoveries between.",
    "request_inference_time_seconds": "From when a world had the request to the last token.",
}
_COUNTS = {
    "request_prompt_tokens": "Prompt tokens of ended requests.",
    "request_generation_tokens": "Tokens that ended requests brought.",
    "request_params_max_tokens": "max_tokens of ended requests.",
}
_PER_TOKEN = "request_time_per_output_token_seconds"


class RequestMetrics:
    """One observation of each for every request that ended with an answer or was cancelled."""

    def __init__(self) -> None:
        self._histograms = {name: Histogram(LATENCY_BUCKETS_S) for name in _SECONDS}
        self._histograms |= {name: Histogram(COUNT_BUCKETS) for name in _COUNTS}
        self._histograms[_PER_TOKEN] = Histogram(PER_TOKEN_BUCKETS_S)

    def ended(self, request: Request) -> None:
        """To be called when a request has ended other than by an error."""
        entry, found = request.entry, self._histograms
        num_tokens = len(entry.output_token_ids) - entry.num_given
        found["request_prompt_tokens"].observe(len(entry.prompt_token_ids))
        found["request_generation_tokens"].observe(num_tokens)
        found["request_params_max_tokens"].observe(entry.params.max_tokens)
        if request.submitted_at is None:
            return  # of an earlier front, whose clock nobody has, or never in a world
        first, last = request.first_token_at, request.last_token_at
        found["request_queue_time_seconds"].observe(request.submitted_at - request.accepted_at)
        if first is None:
            return
        found["request_prefill_time_seconds"].observe(first - request.submitted_at)
        found["request_decode_time_seconds"].observe(last - first)
        found["request_inference_time_seconds"].observe(last - request.submitted_at)
        if num_tokens > 1:
            found[_PER_TOKEN].observe((last - first) / (num_tokens - 1))

    def collect(
        self, labels: Callable[[str], list[str]], values: Callable[[str], list[str]]
    ) -> Iterator[Metric]:
        """For the registry; `labels` and `values` of a prefix."""
        texts = {**_SECONDS, **_COUNTS, _PER_TOKEN: "Between tokens of a request, on average."}
        for name, histogram in self._histograms.items():
            for prefix in ("phalanx_", "vllm:"):
                family = HistogramMetricFamily(prefix + name, texts[name], labels=labels(prefix))
                family.add_metric(values(prefix), histogram.buckets(), histogram.total)
                yield family
