"""OpenTelemetry traces of requests, by the gen_ai conventions, where --otlp-endpoint asks for them.

A request's spans are made when it has ended, out of the times that it has anyway: nothing is paid for a token. With
otlp_metrics.py the one module that imports opentelemetry, and only when traces are on; sending is a thread's work.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.control_messages import Fault
from gateway.errors import GatewayError
from gateway.live_request import Outage, Request
from gateway.otlp_metrics import OFF_VARIABLE, GenAiMetrics

incoming: ContextVar[tuple[dict[str, str], str] | None] = ContextVar("incoming", default=None)
"""The trace headers and the path of the HTTP request that is being answered; None where traces are off."""

_HEADERS = {b"traceparent", b"tracestate"}
FLUSH_S = 1.0
KNOWN_FAULTS = 256
"""The last ones, for the spans of requests that they disturbed."""


class TracingError(GatewayError):
    """Traces were asked for and cannot be made."""


class TraceContexts:
    """Keeps the trace headers of a request for its spans. Made by app.py where traces are on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            carrier = {
                name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _HEADERS
            }
            incoming.set((carrier, scope["path"]))
        await self._app(scope, receive, send)


class Tracer:
    """Makes the spans and the metrics of ended requests and sends them."""

    def __init__(self, endpoint: str, model: str) -> None:
        """`endpoint`: of an OTLP/HTTP receiver, http://host:4318. Raises TracingError."""
        base = endpoint.rstrip("/").removesuffix("/v1/traces")
        self._metrics: GenAiMetrics | None = None
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            resource = Resource.create({"service.name": "phalanx"})
            if os.environ.get(OFF_VARIABLE, "").strip() != "none":
                self._metrics = GenAiMetrics(f"{base}/v1/metrics", resource)
        except ImportError as error:
            text = f"--otlp-endpoint: {error}; install it with pip install 'phalanx-serve[otel]'"
            raise TracingError(text) from None
        self._trace = trace
        self._model = model
        self._propagator = TraceContextTextMapPropagator()
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(f"{base}/v1/traces", timeout=5))
        )
        self._tracer = self._provider.get_tracer("phalanx")
        self._faults: dict[int, Fault] = {}

    def note_faults(self, faults: Iterable[Fault]) -> None:
        """What the supervisor knows of the worlds that died; of each the youngest word counts."""
        for fault in faults:
            self._faults[fault.epoch] = fault
        while len(self._faults) > KNOWN_FAULTS:
            del self._faults[min(self._faults)]

    def ended(self, request: Request, reason: str | None) -> None:
        """The spans of a request that has ended; without a reason it failed."""
        trace, entry = self._trace, request.entry
        carrier, path = request.trace or ({}, "")
        now = time.monotonic()
        to_unix = time.time() - now

        def moment(at: float) -> int:
            return int((at + to_unix) * 1e9)

        operation = _operation(path, request)
        named = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "phalanx",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
        }
        attributes: dict[str, Any] = {
            **named,
            "gen_ai.request.max_tokens": entry.params.max_tokens,
            "gen_ai.request.temperature": entry.params.temperature,
            "gen_ai.request.top_p": entry.params.top_p,
            "gen_ai.usage.input_tokens": len(entry.prompt_token_ids),
            "gen_ai.usage.output_tokens": len(entry.output_token_ids) - entry.num_given,
            "phalanx.request_id": request.request_id,
            "phalanx.worlds": request.submissions,
        }
        error_type = None
        if reason is not None:
            attributes["gen_ai.response.finish_reasons"] = [reason]
        else:
            error_type = attributes["error.type"] = "_OTHER" if entry.error is None else entry.error[0]
        first, submitted = request.first_token_at, request.submitted_at
        if first is not None and submitted is not None:
            attributes["gen_ai.server.time_to_first_token"] = first - request.accepted_at
        root = self._tracer.start_span(
            f"{operation} {self._model}",
            context=self._propagator.extract(carrier),
            kind=trace.SpanKind.SERVER,
            attributes=attributes,
            start_time=moment(request.accepted_at),
        )
        if reason is None:
            root.set_status(trace.StatusCode.ERROR)
        below = trace.set_span_in_context(root)

        def part(name: str, begin: float, end: float | None, **shown: Any) -> None:
            span = self._tracer.start_span(name, below, start_time=moment(begin), attributes=shown)
            span.end(moment(now if end is None else end))

        part("queue", request.accepted_at, submitted)
        if submitted is not None:
            part("prefill", submitted, first, **_step(request.first_step))
            if first is not None:
                part("decode", first, request.last_token_at, **_step(request.last_step))
        for outage in request.outages:
            self._show_outage(outage, root, part, moment)
        root.end(moment(now))
        if self._metrics is not None:
            self._metrics.ended(request, named, error_type, now - request.accepted_at)

    def _show_outage(
        self, outage: Outage, root: Any, part: Callable[..., None], moment: Callable[[float], int]
    ) -> None:
        """From the loss of a world to the first token of the next one; without a fault the request was taken out of
        a world that lived on, or the change was planned."""
        shown: dict[str, Any] = {}
        if outage.lost_epoch is not None:
            shown["phalanx.epoch.lost"] = outage.lost_epoch
        if outage.epoch is not None and outage.submitted_at is not None:
            root.add_event(
                "world changed", {"phalanx.epoch": outage.epoch}, timestamp=moment(outage.submitted_at)
            )
            shown["phalanx.epoch"] = outage.epoch
            shown["phalanx.recovery.resubmit_s"] = outage.submitted_at - outage.began_at
        fault = None if outage.lost_epoch is None else self._faults.get(outage.lost_epoch)
        if fault is not None:
            shown["phalanx.fault.kind"] = fault.kind
            shown["phalanx.fault.detail"] = fault.detail
            for name in ("rank", "detect_s", "abort_s", "recover_s"):
                if (value := getattr(fault, name)) is not None:
                    shown[f"phalanx.fault.{name}"] = value
        part("recovery", outage.began_at, outage.resumed_at, **shown)

    def close(self) -> None:
        """Sends what is left, for FLUSH_S at most."""
        # In threads: the exporters try longer than that where nobody answers.
        flushes: list[Callable[[], object]] = [self._provider.force_flush]
        if self._metrics is not None:
            flushes.append(self._metrics.flush)
        sending = [threading.Thread(target=flush, daemon=True) for flush in flushes]
        give_up_at = time.monotonic() + FLUSH_S
        for thread in sending:
            thread.start()
        for thread in sending:
            thread.join(max(0.0, give_up_at - time.monotonic()))


def _operation(path: str, request: Request) -> str:
    """As the conventions name what was asked for."""
    if request.entry.params.pooling is not None:
        return "embeddings"
    return "text_completion" if path.endswith("/v1/completions") else "chat"


def _step(step: tuple[int, int] | None) -> dict[str, int]:
    """Where a token was made."""
    return {} if step is None else {"phalanx.epoch": step[0], "phalanx.step": step[1]}
