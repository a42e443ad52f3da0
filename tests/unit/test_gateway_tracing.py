"""Traces, as a real OTLP/HTTP receiver in this process gets them."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.echo_world import EchoCluster
from tests.unit.http_asking import CHAT, TEXT, ask, chat

pytestmark = pytest.mark.slow
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"


class Receiver:
    """Remembers the spans that it was sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                message = ExportTraceServiceRequest.FromString(body)
                assert self.path == "/v1/traces"
                for resource in message.resource_spans:
                    for scope in resource.scope_spans:
                        receiver.spans += scope.spans
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def of(self, trace_id: str) -> dict[str, Any]:
        """The spans of one trace, by name."""
        return {span.name: span for span in list(self.spans) if span.trace_id.hex() == trace_id}


def attributes(span: Any) -> dict[str, Any]:
    found = {}
    for one in span.attributes:
        kind = one.value.WhichOneof("value")
        value = getattr(one.value, kind)
        found[one.key] = [v.string_value for v in value.values] if kind == "array_value" else value
    return found


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> Iterator[EchoCluster]:
    folder: Path = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        options = ("--otlp-endpoint", receiver.url)
        with EchoCluster(folder, step_s=0.005, front_options=options) as cluster:
            cluster.wait_serving(cluster.start_world())
            yield cluster


def test_a_request_is_a_span_of_the_client_s_trace(cluster: EchoCluster, receiver: Receiver) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
    ask(cluster, CHAT, chat("very-private", max_tokens=9, ignore_eos=True), headers=headers)
    cluster.wait(lambda: len(receiver.of(TRACE_ID)) == 4)
    spans = receiver.of(TRACE_ID)
    root = spans["chat echo"]
    assert root.parent_span_id.hex() == PARENT_ID and root.kind == 2  # SERVER
    shown = attributes(root)
    assert shown["gen_ai.operation.name"] == "chat" and shown["gen_ai.provider.name"] == "phalanx"
    assert shown["gen_ai.usage.output_tokens"] == 9 and shown["gen_ai.response.finish_reasons"] == ["length"]
    assert shown["gen_ai.usage.input_tokens"] > 9 and shown["gen_ai.request.model"] == "echo"
    times = [root.start_time_unix_nano]
    for name in ("queue", "prefill", "decode"):
        part = spans[name]
        assert part.parent_span_id == root.span_id
        assert part.start_time_unix_nano >= times[-1] - 1_000_000  # each begins where the one before ends
        times.append(part.end_time_unix_nano)
    assert times == sorted(times) and times[-1] <= root.end_time_unix_nano
    assert b"private" not in b"".join(span.SerializeToString() for span in receiver.spans)


def test_a_world_change_is_an_event(cluster: EchoCluster, receiver: Receiver) -> None:
    trace_id = TRACE_ID[::-1]
    headers = {"traceparent": f"00-{trace_id}-{PARENT_ID}-01"}
    thread = threading.Thread(
        target=ask,
        args=(cluster, TEXT, {"prompt": "abcd", "max_tokens": 200, "ignore_eos": True}),
        kwargs={"headers": headers},
    )
    thread.start()
    cluster.wait(lambda: b'phalanx_requests_live{model="echo"} 1.0' in cluster.get("/metrics")[1])
    cluster.kill_world()
    cluster.wait_serving(None)
    epoch = cluster.start_world()
    thread.join(30)
    cluster.wait(lambda: "text_completion echo" in receiver.of(trace_id))
    root = receiver.of(trace_id)["text_completion echo"]
    [event] = root.events
    assert event.name == "world changed" and event.attributes[0].value.int_value == epoch
    assert attributes(root)["phalanx.worlds"] == 2


def test_what_the_client_does_not_sample_is_not_sent(cluster: EchoCluster, receiver: Receiver) -> None:
    for number, flag in ((1, "00"), (2, "01")):
        headers = {"traceparent": f"00-{number:032x}-{PARENT_ID}-{flag}"}
        ask(cluster, TEXT, {"prompt": "ab", "max_tokens": 2}, headers=headers)
    cluster.wait(lambda: bool(receiver.of(f"{2:032x}")))
    assert not receiver.of(f"{1:032x}")
