"""Bad input over ZeroMQ, gRPC and HTTP, more than 10,000 of it, against a real front and a real gateway of rank 0: no
crash, no server's fault, no growth of memory, and the next honest client is served."""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import msgpack
import psutil
import pytest
import zmq

from gateway.client import Client, SamplingParams
from gateway.rpc import inference_pb2 as pb
from tests.client_environments import client_environment
from tests.echo_world import EchoCluster, echo_tokens

pytestmark = pytest.mark.slow
FRAMES = 3000
"""To each of the two ZeroMQ servers."""
CALLS = 2000
GROWTH_BYTES = 32 * 2**20
"""That a process may grow by while it is fuzzed, after a first round has filled its caches: allocators keep pages of
large messages, of which a few of 16 MiB are in hand at a time."""
SUBMIT: dict[str, Any] = {
    "type": "submit",
    "request_id": "a",
    "prompt": "abc",
    "params": {"max_tokens": 3, "temperature": 0.0, "logit_bias": {5: 1.0}, "bad_words": [[5, 6]]},
    "stop": ["x"],
    "output_token_ids": [],
    "priority": 1,
    "key": "",
    "credit": 5,
}
VALID: tuple[dict[str, Any], ...] = (
    {"type": "hello", "min_version": 1, "max_version": 1, "client": "f"},
    SUBMIT,
    {**{name: value for name, value in SUBMIT.items() if name != "prompt"}, "prompt_token_ids": [5, 6, 7]},
    {**SUBMIT, "prompt": None, "messages": [{"role": "user", "content": "hi"}]},
    {**SUBMIT, "continuation": "d", "params": {"pooling": {"kind": "score"}}},
    {"type": "cancel", "request_id": "a", "epoch": 0},
    {"type": "credit", "request_id": "a", "tokens": 3},
    {"type": "ping", "sent_at": 1.0},
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    options = ("--grpc", "127.0.0.1:0")
    with EchoCluster(tmp_path_factory.mktemp("echo"), front_options=options) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


class Watch:
    """A process that must live on and not grow."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._before = self._process.memory_info().rss

    def settle(self) -> None:
        """Caches and pools have filled: from here on nothing may grow."""
        self._before = self._process.memory_info().rss

    def check(self) -> None:
        assert self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE
        grown = self._process.memory_info().rss - self._before
        assert grown < GROWTH_BYTES, f"grown by {grown >> 20} MiB"


MADE: dict[str, int] = {}
"""Bad inputs, by the test that made them."""


def strange(rng: random.Random, depth: int = 0) -> Any:
    """Any value that msgpack has, also large and nested ones."""
    kind = rng.randrange(14)
    if kind < 2 and depth < 4:
        return [strange(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 2 and depth < 4:
        return {str(strange(rng, 9)): strange(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice(
        [
            None, True, False, -1, 0, 2**31, 2**63 - 1, -(2**63), 2**64 - 1, 0.5, float("nan"), float("inf"), "",
            "x" * rng.choice([1, 255, 256, 5000]), "\u00e9\U0001f600\x00", b"\x80\xff",
            [1] * rng.choice([300, 20_000]), {"a": 1}, msgpack.ExtType(5, b"x"), msgpack.Timestamp(1, 2), -0.0, 1e308,
        ]
    )  # fmt: skip


def nested(depth: int, innermost: bytes = b"\xc0") -> bytes:
    return b"\x91" * depth + innermost


def bad_frames(rng: random.Random) -> list[bytes]:
    """One message of one to three frames, hardly ever a valid one."""
    message: Any = {**rng.choice(VALID)}
    kind = rng.randrange(8)
    if kind == 0:
        return [rng.randbytes(rng.choice([0, 1, 7, 100, 3000]))]
    if kind == 1:  # the bytes of a valid one, some of them changed, or its end missing
        data = bytearray(msgpack.packb(message))
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return [bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])]
    if kind == 2:  # deep, or with a length that is a lie
        depth = rng.choice([100, 10_000, 500_000])
        lies = [
            b"\xdd\xff\xff\xff\xff",
            b"\xdf\x7f\xff\xff\xff",
            b"\xc6\xff\xff\xff\xf0",
            b"\xdb\xff\xff\xff\xff",
        ]
        head = b"\x82\xa4type\xa6submit\xa6params"
        return [rng.choice([nested(depth), head + nested(depth), head + rng.choice(lies), rng.choice(lies)])]
    if kind == 3:
        return [rng.randbytes(3) for _ in range(rng.choice([2, 3, 50]))]
    if kind == 4 and rng.random() < 0.05:
        return [msgpack.packb({**SUBMIT, "prompt": "x" * rng.choice([2**20, 2**24 - 500, 2**24 + 1])})]
    for _ in range(rng.randrange(1, 3)):  # wrong values at right places, also inside
        into = message
        if isinstance(message.get("params"), dict) and rng.random() < 0.5:
            into = message["params"] = {**message["params"]}
        name = rng.choice(
            [*into, "type", "epoch", "deadline_s", "grammar", "seed", "logprobs", "pooling", "top_p"]
        )
        into[name] = strange(rng)
    return [msgpack.packb(message)]


def fuzz(endpoint: str, rng: random.Random, count: int) -> None:
    """From connections that are greeted, and from some that are not. Requests that were taken for good end with their
    connection."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    refused = 0
    try:
        for _ in range(count // 100):
            with context.socket(zmq.DEALER, socket_class=zmq.Socket) as dealer:
                dealer.linger = 0
                dealer.connect(endpoint)
                if rng.random() < 0.8:
                    dealer.send(msgpack.packb(VALID[0]))
                for _ in range(100):
                    dealer.send_multipart(bad_frames(rng))
                refused += read_to_the_end(dealer)
    finally:
        context.destroy(linger=0)
    assert refused > count // 3, f"{refused} of {count} were refused: the others never came"


def read_to_the_end(dealer: zmq.Socket[bytes]) -> int:
    """Until a last hello is answered, so that everything before it was read; how much was refused. A message that was
    too long has ended the connection, and what was under way with it is gone."""
    refused = 0
    for _ in range(4):
        dealer.send(msgpack.packb({**VALID[0], "client": "last", "max_version": 0, "min_version": 0}))
        while dealer.poll(3000):
            answer = msgpack.unpackb(dealer.recv(), strict_map_key=False)
            if answer["type"] == "failed":
                # Whatever it was, it was not the server's fault.
                assert answer["code"] != "internal", answer
                if "the client 0 to 0" in answer["message"]:
                    return refused
                refused += 1
    raise AssertionError("the server answers no more")


def serves(endpoint: str) -> None:
    with Client(endpoint) as client:
        prompt = [10, 11, 12]
        assert client.generate(prompt, SamplingParams(max_tokens=9)).token_ids == echo_tokens(prompt, 9)


@pytest.mark.parametrize("server", ["front", "rank 0"])
def test_frames(cluster: EchoCluster, server: str) -> None:
    [(process, world)] = cluster.worlds.values()
    endpoint, pid = (cluster.zmq, cluster.front.pid) if server == "front" else (world.gateway, process.pid)
    watch = Watch(pid)
    rng = random.Random(server)
    fuzz(endpoint, rng, FRAMES // 2)
    serves(endpoint)
    watch.settle()
    fuzz(endpoint, rng, FRAMES // 2)
    serves(endpoint)
    watch.check()
    MADE[f"frames to {server}"] = FRAMES
    assert '"level": "error"' not in cluster.front_log.read_text()


def bad_call(rng: random.Random) -> tuple[str, bytes]:
    """A method, and bytes that are hardly ever one of its messages."""
    methods = ("ModelInfer", "ModelMetadata", "ModelReady", "ModelConfig", "ModelStatistics", "RepositoryIndex",
               "RepositoryModelLoad", "ServerLive", "NoSuchMethod")  # fmt: skip
    if rng.random() < 0.3:
        return rng.choice(methods), rng.randbytes(rng.choice([0, 1, 20, 500]))
    request = pb.ModelInferRequest(model_name=rng.choice(["simple", "simple_identity", "echo", "x", ""]))
    request.model_version = rng.choice(["", "1", "2", "x" * 1000])
    request.id = rng.choice(["", "id", "\u00e9" * 300])
    for _ in range(rng.randrange(4)):
        tensor = request.inputs.add(
            name=rng.choice(["INPUT0", "INPUT1", "text_input", "stream", "max_tokens", "?"])
        )
        tensor.datatype = rng.choice(["INT32", "BYTES", "FP16", "BOOL", "UINT64", "", "NONE"])
        sizes = [0, 1, 16, -1, 2**31, 2**62, -(2**63)]
        tensor.shape.extend(rng.choice(sizes) for _ in range(rng.choice([0, 1, 2, 2, 20])))
        if rng.random() < 0.4:
            tensor.contents.int_contents.extend(
                rng.randrange(-(2**31), 2**31) for _ in range(rng.choice([1, 16]))
            )
        if rng.random() < 0.3:
            tensor.contents.bytes_contents.append(rng.randbytes(rng.randrange(10)))
        if rng.random() < 0.6:
            raws = [b"", b"\xff\xff\xff\xff", rng.randbytes(64), b"\x03\x00\x00\x00abc", b"\x00" * 5000]
            request.raw_input_contents.append(rng.choice(raws))
    for name in rng.sample(
        ["max_tokens", "temperature", "seed", "stop", "timeout", "stream", "guided_json"], 2
    ):
        parameter = request.parameters[name]
        values = {"int64_param": -(2**63), "string_param": "\x00" * 50, "bool_param": True,
                  "double_param": float("nan"), "uint64_param": 2**64 - 1}  # fmt: skip
        setattr(parameter, *rng.choice(list(values.items())))
    if rng.random() < 0.2:
        request.outputs.add(name=rng.choice(["OUTPUT0", "?", ""]))
    data = bytearray(request.SerializeToString())
    if data and rng.random() < 0.5:
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    return "ModelInfer", bytes(data)


def test_grpc_calls(cluster: EchoCluster) -> None:
    watch = Watch(cluster.front.pid)
    rng = random.Random(5)
    codes: dict[grpc.StatusCode, int] = {}
    with grpc.insecure_channel(cluster.grpc) as channel:
        for number in range(CALLS):
            method, data = bad_call(rng)
            path = f"/inference.GRPCInferenceService/{method}"
            try:
                if number % 5 == 0 and method == "ModelInfer":
                    stream = channel.stream_stream(f"{path.replace('ModelInfer', 'ModelStreamInfer')}")
                    for answer in stream(iter([data]), timeout=10):
                        assert b"the server failed" not in answer, data
                else:
                    channel.unary_unary(path)(data, timeout=10)
            except grpc.RpcError as error:
                codes[error.code()] = codes.get(error.code(), 0) + 1
                assert error.code() not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), (data, error)
            if number == CALLS // 2:
                watch.settle()
        assert pb.ServerLiveResponse.FromString(
            channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=10)
        ).live
    assert codes[grpc.StatusCode.INVALID_ARGUMENT] > CALLS // 10, codes
    watch.check()
    MADE["gRPC calls"] = CALLS
    assert '"level": "error"' not in cluster.front_log.read_text()


@pytest.mark.timeout(900)
def test_http_by_its_own_description(cluster: EchoCluster, tmp_path: Path) -> None:
    """Schemathesis makes requests for every operation in /openapi.json, most of them wrong. It has an
    environment of its own, made by the first run."""
    python = client_environment("schemathesis==4.32.5")
    watch = Watch(cluster.front.pid)
    command = [python, "-m", "schemathesis.cli", "run", f"{cluster.url}/openapi.json", "--url", cluster.url]
    command += ["--mode", "all"]
    command += [
        "--phases",
        "examples,coverage,fuzzing",
        "--checks",
        "not_a_server_error",
        "--max-examples",
        "4",
    ]
    command += [
        "--request-timeout",
        "20",
        "--suppress-health-check",
        "all",
        "--continue-on-failure",
        "--seed",
        "1",
    ]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=variables, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    [made] = re.findall(r"(\d+) generated", done.stdout)
    assert int(made) > 2000
    MADE["HTTP requests"] = int(made)
    serves(cluster.zmq)
    watch.check()
    assert '"level": "error"' not in cluster.front_log.read_text()


def test_it_was_ten_thousand(cluster: EchoCluster) -> None:
    """All of it at one front, which is the one that was started."""
    if len(MADE) < 4:
        pytest.skip("only some of the tests above were run")
    assert sum(MADE.values()) >= 10_000, MADE
    assert psutil.Process(cluster.front.pid).memory_info().rss < 2**29
    assert cluster.front.poll() is None
    serves(cluster.zmq)
