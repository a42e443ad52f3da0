"""OpenTelemetry traces of requests, by the gen_ai conventions, where --otlp-endpoint asks for them.

A request's spans are made when it has ended, out of the times that it has anyway: nothing is paid for a token. The
one module that imports opentelemetry, and only when traces are on; sending is a thread's work.
"""

from __future__ import annotations

import threading
import time
from contextvars import ContextVar
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.errors import GatewayError
from gateway.live_request import Request

incoming: ContextVar[tuple[dict[str, str], str] | None] = ContextVar("incoming", default=None)
"""The trace headers and the path of the HTTP request that is being answered; None where traces are off."""

_HEADERS = {b"traceparent", b"tracestate"}
FLUSH_S = 1.0


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
    """Makes the spans of ended requests and sends them."""

    def __init__(self, endpoint: str, model: str) -> None:
        """`endpoint`: of an OTLP/HTTP receiver, http://host:4318. Raises TracingError."""
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            text = f"--otlp-endpoint: {error}; install it with pip install 'phalanx-serve[otel]'"
            raise TracingError(text) from None
        url = endpoint.rstrip("/")
        url = url if url.endswith("/v1/traces") else f"{url}/v1/traces"
        self._trace = trace
        self._model = model
        self._propagator = TraceContextTextMapPropagator()
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "phalanx"}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url, timeout=5)))
        self._tracer = self._provider.get_tracer("phalanx")

    def ended(self, request: Request, reason: str | None) -> None:
        """The spans of a request that has ended; without a reason it failed."""
        trace, entry = self._trace, request.entry
        carrier, path = request.trace or ({}, "")
        to_unix = time.time() - time.monotonic()

        def moment(at: float) -> int:
            return int((at + to_unix) * 1e9)

        operation = "text_completion" if path.endswith("/v1/completions") else "chat"
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "phalanx",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.request.max_tokens": entry.params.max_tokens,
            "gen_ai.usage.input_tokens": len(entry.prompt_token_ids),
            "gen_ai.usage.output_tokens": len(entry.output_token_ids) - entry.num_given,
            "phalanx.request_id": request.request_id,
            "phalanx.worlds": request.submissions,
        }
        if reason is not None:
            attributes["gen_ai.response.finish_reasons"] = [reason]
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
        for epoch, at in request.changes:
            root.add_event("world changed", {"phalanx.epoch": epoch}, timestamp=moment(at))
        if reason is None:
            root.set_status(trace.StatusCode.ERROR)
        now = time.monotonic()
        parts = [("queue", request.accepted_at, submitted)]
        if submitted is not None:
            parts += [("prefill", submitted, first)]
            parts += [("decode", first, request.last_token_at)] if first is not None else []
        below = trace.set_span_in_context(root)
        for name, begin, end in parts:
            if begin is not None:
                part = self._tracer.start_span(name, context=below, start_time=moment(begin))
                part.end(moment(now if end is None else end))
        root.end(moment(now))

    def close(self) -> None:
        """Sends what is left, for FLUSH_S at most."""
        # In a thread: the exporter tries longer than that where nobody answers.
        sending = threading.Thread(target=self._provider.force_flush, daemon=True)
        sending.start()
        sending.join(FLUSH_S)
