"""The gen_ai metrics of OpenTelemetry, beside what Prometheus scrapes. Made by tracing.py where OTLP is asked for,
and fed by it once a request.

Names, units and buckets are those of the semantic conventions for generative AI (opentelemetry.io/docs/specs/semconv/
gen-ai/gen-ai-metrics). Imports opentelemetry only when it is made; sending is a thread's work.
"""

from __future__ import annotations

from typing import Any

from gateway.live_request import Request

_DURATION_BUCKETS_S = tuple(0.01 * 2**power for power in range(14))
_FIRST_TOKEN_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
_PER_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TOKEN_BUCKETS = tuple(4**power for power in range(14))
OFF_VARIABLE = "OTEL_METRICS_EXPORTER"
"""`none` sends traces alone, for receivers that take nothing else."""


class GenAiMetrics:
    """One observation of each for every request that has ended."""

    def __init__(self, url: str, resource: Any) -> None:
        """`url`: of the receiver's /v1/metrics. `resource`: who this is. Raises ImportError."""
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

        reader = PeriodicExportingMetricReader(OTLPMetricExporter(url, timeout=5))
        self._provider = MeterProvider([reader], resource, shutdown_on_exit=False)
        meter = self._provider.get_meter("phalanx")

        def histogram(name: str, unit: str, text: str, buckets: tuple[float, ...]) -> Any:
            return meter.create_histogram(name, unit, text, explicit_bucket_boundaries_advisory=buckets)

        self._duration = histogram(
            "gen_ai.server.request.duration",
            "s",
            "Generative AI server request duration such as time-to-last byte or last output token",
            _DURATION_BUCKETS_S,
        )
        self._first_token = histogram(
            "gen_ai.server.time_to_first_token",
            "s",
            "Time to generate first token for successful responses",
            _FIRST_TOKEN_BUCKETS_S,
        )
        self._per_token = histogram(
            "gen_ai.server.time_per_output_token",
            "s",
            "Time per output token generated after the first token for successful responses",
            _PER_TOKEN_BUCKETS_S,
        )
        self._tokens = histogram(
            "gen_ai.client.token.usage", "{token}", "Number of input and output tokens used", _TOKEN_BUCKETS
        )

    def ended(
        self, request: Request, attributes: dict[str, str], error_type: str | None, duration_s: float
    ) -> None:
        """`attributes`: operation, provider and models, as the request's span has them. `error_type`: of one that
        failed."""
        entry = request.entry
        failed = {} if error_type is None else {"error.type": error_type}
        self._duration.record(duration_s, {**attributes, **failed})
        num_tokens = len(entry.output_token_ids) - entry.num_given
        self._tokens.record(len(entry.prompt_token_ids), {**attributes, "gen_ai.token.type": "input"})
        if num_tokens:
            self._tokens.record(num_tokens, {**attributes, "gen_ai.token.type": "output"})
        first = request.first_token_at
        if error_type is not None or first is None or request.submitted_at is None:
            return  # failed, or of an earlier front, whose clock nobody has
        self._first_token.record(first - request.accepted_at, attributes)
        if num_tokens > 1:
            self._per_token.record((request.last_token_at - first) / (num_tokens - 1), attributes)

    def flush(self) -> None:
        """Sends what is left; may take as long as the exporter tries."""
        self._provider.force_flush()
