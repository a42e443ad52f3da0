"""Traces and metrics, as a real OTLP/HTTP receiver in this process gets them."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from gateway.control_messages import Fault
from tests.echo_world import EchoCluster
from tests.unit.http_asking import CHAT, TEXT, ask, chat

pytestmark = pytest.mark.slow
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"


class Receiver:
    """Remembers the spans that it was sent, and the last state of each metric."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.metrics: dict[str, Any] = {}
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                if self.path == "/v1/metrics":
                    for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                        for scope in resource.scope_metrics:
                            receiver.metrics |= {metric.name: metric for metric in scope.metrics}
                else:
                    assert self.path == "/v1/traces"
                    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
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

    def points(self, name: str) -> list[tuple[dict[str, Any], Any]]:
        """Of a histogram: attributes, and the point."""
        metric = self.metrics.get(name)
        return (
            [] if metric is None else [(attributes(point), point) for point in metric.histogram.data_points]
        )

    def count(self, name: str, **wanted: str) -> int:
        """Observations with these attributes; underscores stand for dots."""
        keys = {key.replace("__", "."): value for key, value in wanted.items()}
        return sum(point.count for found, point in self.points(name) if keys.items() <= found.items())


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
        patch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "200")
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
    steps = [attributes(spans[name])["phalanx.step"] for name in ("prefill", "decode")]
    assert steps[0] > 0 and steps[1] - steps[0] == 8  # of the first and of the ninth token
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
    lost = cluster.epoch
    cluster.faults.append(
        Fault(lost, 0.0, "killed", 0, "here", "rank 0 was killed by SIGKILL", detect_s=0.25)
    )
    cluster.kill_world()
    cluster.wait_serving(None)
    epoch = cluster.start_world()
    thread.join(30)
    cluster.wait(lambda: "text_completion echo" in receiver.of(trace_id))
    root = receiver.of(trace_id)["text_completion echo"]
    [event] = root.events
    assert event.name == "world changed" and event.attributes[0].value.int_value == epoch
    assert attributes(root)["phalanx.worlds"] == 2
    recovery = receiver.of(trace_id)["recovery"]
    assert recovery.parent_span_id == root.span_id
    shown = attributes(recovery)
    assert (shown["phalanx.epoch.lost"], shown["phalanx.epoch"]) == (lost, epoch)
    assert (shown["phalanx.fault.kind"], shown["phalanx.fault.detail"]) == (
        "killed",
        "rank 0 was killed by SIGKILL",
    )
    assert shown["phalanx.fault.detect_s"] == 0.25 and shown["phalanx.recovery.resubmit_s"] > 0
    # The hole in the stream: from the loss of the world, over the new one, to the next token.
    decode = receiver.of(trace_id)["decode"]
    assert decode.start_time_unix_nano < recovery.start_time_unix_nano < event.time_unix_nano
    assert event.time_unix_nano < recovery.end_time_unix_nano < decode.end_time_unix_nano
    assert attributes(decode)["phalanx.epoch"] == epoch


def test_metrics_by_the_conventions(cluster: EchoCluster, receiver: Receiver) -> None:
    names = ["request.duration", "time_to_first_token", "time_per_output_token"]
    server = [f"gen_ai.server.{name}" for name in names]
    tokens = "gen_ai.client.token.usage"

    def counts() -> list[int]:
        kinds = [receiver.count(tokens, gen_ai__token__type=kind) for kind in ("input", "output")]
        return [*(receiver.count(name, gen_ai__operation__name="chat") for name in server), *kinds]

    for _ in range(3):
        ask(cluster, CHAT, chat("private words", max_tokens=5, ignore_eos=True))
    cluster.wait(lambda: min(counts()) >= 3)
    for name in server:
        assert receiver.metrics[name].unit == "s"
        shown, _ = receiver.points(name)[0]
        assert shown["gen_ai.provider.name"] == "phalanx"
        assert shown["gen_ai.request.model"] == shown["gen_ai.response.model"] == "echo"
    assert receiver.metrics[tokens].unit == "{token}"
    [(_, point)] = [(a, p) for a, p in receiver.points(server[0]) if a["gen_ai.operation.name"] == "chat"]
    assert list(point.explicit_bounds)[:3] == [0.01, 0.02, 0.04] and point.explicit_bounds[-1] == 81.92
    [(_, point)] = [(a, p) for a, p in receiver.points(server[2]) if a["gen_ai.operation.name"] == "chat"]
    assert 0.004 < point.sum / point.count < 1  # a step of the echo world takes 5 ms

    body = {**chat("very slow", max_tokens=4000, ignore_eos=True), "timeout": 0.05}
    status, _, _ = ask(cluster, CHAT, body)
    assert status == 408
    cluster.wait(lambda: receiver.count(server[0], error__type="timeout") == 1)
    assert receiver.count(server[1], error__type="timeout") == 0
    assert b"private" not in b"".join(metric.SerializeToString() for metric in receiver.metrics.values())


def test_what_the_client_does_not_sample_is_not_sent(cluster: EchoCluster, receiver: Receiver) -> None:
    for number, flag in ((1, "00"), (2, "01")):
        headers = {"traceparent": f"00-{number:032x}-{PARENT_ID}-{flag}"}
        ask(cluster, TEXT, {"prompt": "ab", "max_tokens": 2}, headers=headers)
    cluster.wait(lambda: bool(receiver.of(f"{2:032x}")))
    assert not receiver.of(f"{1:032x}")
