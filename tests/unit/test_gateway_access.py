"""Who may ask the front, and how: API keys over HTTP and gRPC, limits of keys, hosts, origins, logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import openai
import pytest

from gateway.key_file import make_key, save
from gateway.rpc import inference_pb2 as pb
from tests.echo_world import EchoCluster
from tests.terminal import Terminal
from tests.unit.http_asking import CHAT, TEXT, ask, chat

pytestmark = pytest.mark.slow

ALICE, ALICE_RECORD = make_key("alice")
BOB, BOB_RECORD = make_key("bob")
CAROL, CAROL_RECORD = make_key("carol", requests_per_minute=3, tokens_per_minute=1000)
DAVE, DAVE_RECORD = make_key("dave", tokens_per_minute=30)
ERIN, ERIN_RECORD = make_key("erin", tokens_per_minute=1000)
COMPLETION = {"prompt": "abc", "max_tokens": 3}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    folder: Path = tmp_path_factory.mktemp("run")
    save(folder / "keys.json", [ALICE_RECORD, BOB_RECORD, CAROL_RECORD, DAVE_RECORD, ERIN_RECORD])
    options = ("--api-key-file", str(folder / "keys.json"), "--grpc", "127.0.0.1:0", "--access-log")
    options += ("--allowed-origins", "https://a.example,https://b.example")
    options += ("--allowed-hosts", "127.0.0.1,api.example", "--log-level", "debug")
    with EchoCluster(folder, step_s=0.001, front_options=options) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "path", ["/v1/models", TEXT, "/metrics", "/cluster", "/v2", "/v1/requests/x", "/none", "//health"]
)
def test_nobody_without_a_key(cluster: EchoCluster, path: str) -> None:
    for headers in ({}, bearer("phx-00000000-x"), bearer(""), {"authorization": ALICE}, {"x-api-key": "é"}):
        status, got, answer = ask(cluster, path, method="GET", headers=headers)
        assert status == 401 and got["www-authenticate"] == "Bearer" and got["x-request-id"]
        assert "API key" in (answer["error"] if path == "/v2/" else answer["error"]["message"])


@pytest.mark.parametrize(
    "path", ["/health", "/health/live", "/health/ready", "/health/accepting", "/v2/health/ready", "/ping"]
)
def test_probes_need_none(cluster: EchoCluster, path: str) -> None:
    assert ask(cluster, path, method="GET")[0] == 200


def test_both_headers_and_the_sdk(cluster: EchoCluster) -> None:
    for headers in (bearer(ALICE), {"authorization": f"bearer {BOB}"}, {"x-api-key": ALICE}):
        status, got, _ = ask(cluster, TEXT, COMPLETION, headers=headers)
        assert status == 200 and not any(name.startswith("x-ratelimit") for name in got)
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=ALICE, max_retries=0)
    assert client.completions.create(model="echo", prompt="ab", max_tokens=2).choices[0].text == "ab"
    with pytest.raises(openai.AuthenticationError, match="API key"):
        client.with_options(api_key="wrong").models.list()


@pytest.mark.parametrize("variable", [None, "PHALANX_API_KEY", "OPENAI_API_KEY"])
def test_bench_brings_its_key(cluster: EchoCluster, variable: str | None) -> None:
    command = [sys.executable, "-m", "launcher.cli", "bench", "--url", cluster.url, "--requests", "2"]
    unset = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, env=unset)
    assert refused.returncode != 0 and "API key" in refused.stdout + refused.stderr
    given = ["--api-key", ALICE] if variable is None else []
    known = {**unset, variable: ALICE} if variable is not None else unset
    done = subprocess.run([*command, *given], capture_output=True, text=True, timeout=60, env=known)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("model", [(), ("--model", "echo")])
def test_chat_brings_its_key(cluster: EchoCluster, model: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "launcher.cli", "chat", "--url", cluster.url, *model]
    unset = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}

    def chatted(*given: str, question: str = "hello\n", **known: str) -> subprocess.CompletedProcess[str]:
        environment = {**unset, **known}
        return subprocess.run(
            [*command, *given], input=question, env=environment, capture_output=True, text=True, timeout=60
        )

    for done in (chatted("--api-key", ALICE), chatted(PHALANX_API_KEY=ALICE), chatted(OPENAI_API_KEY=ALICE)):
        assert (done.returncode, done.stdout, done.stderr) == (0, "user\nhello\n", ""), done
    for refused, problem in (
        (chatted("--api-key", "wrong", PHALANX_API_KEY=ALICE), "the server does not know this API key"),
        (chatted(PHALANX_API_KEY="wrong"), "the server does not know this API key"),
        (chatted(), "the server wants an API key"),
        (chatted(question=""), "the server wants an API key"),
    ):
        assert refused.returncode == 1 and not refused.stdout, refused
        assert refused.stderr.count("\n") == 1 and problem in refused.stderr, refused


def test_chat_with_a_wrong_key_does_not_wait_for_a_question(cluster: EchoCluster) -> None:
    command = [sys.executable, "-m", "launcher.cli", "chat", "--url", cluster.url]
    terminal = Terminal([*command, "--model", "echo", "--api-key", "wrong"])
    shown = terminal.read_until("the server does not know this API key")
    assert terminal.wait() == 1 and "> " not in shown + terminal.output


def test_errors_in_the_words_of_others(cluster: EchoCluster) -> None:
    _, _, answer = ask(cluster, "/v1/messages", {})
    assert (answer["type"], answer["error"]["type"]) == ("error", "authentication_error")
    _, _, answer = ask(cluster, "/v2/models/echo", method="GET")
    assert isinstance(answer["error"], str)


def test_requests_belong_to_their_key(cluster: EchoCluster) -> None:
    with_key = {**bearer(ALICE), "idempotency-key": "mine"}
    _, got, mine = ask(cluster, TEXT, COMPLETION, headers=with_key)
    call_id = got["x-phalanx-request-id"]
    path = f"/v1/requests/{call_id}"
    assert ask(cluster, path, method="GET", headers=bearer(ALICE))[0] == 200
    for method, tried in (("GET", path), ("DELETE", path), ("GET", f"{path}/stream")):
        assert ask(cluster, tried, method=method, headers=bearer(BOB))[0] == 404
    # The same Idempotency-Key is another one in the hands of somebody else.
    _, _, again = ask(cluster, TEXT, COMPLETION, headers=with_key)
    _, _, other = ask(cluster, TEXT, COMPLETION, headers={**bearer(BOB), "idempotency-key": "mine"})
    assert again["id"] == mine["id"] != other["id"]
    # And so it stays when the front is another one.
    cluster.restart_front()
    cluster.wait_serving(cluster.epoch)
    assert ask(cluster, path, method="GET", headers=bearer(BOB))[0] == 404
    assert ask(cluster, path, method="GET", headers=bearer(ALICE))[0] == 200


def test_files_and_batches_belong_to_their_key_and_count_for_it(cluster: EchoCluster) -> None:
    erin, bob = (
        openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=key, max_retries=0) for key in (ERIN, BOB)
    )
    body = {"prompt": "abcde", "max_tokens": 20, "ignore_eos": True}
    lines = [{"custom_id": str(n), "method": "POST", "url": TEXT, "body": body} for n in range(4)]
    content = "\n".join(json.dumps(line) for line in lines).encode()
    file = erin.files.create(file=("in.jsonl", content), purpose="batch")
    batch = erin.batches.create(input_file_id=file.id, endpoint=TEXT, completion_window="24h")
    deadline = time.monotonic() + 30
    while batch.status != "completed":
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
        batch = erin.batches.retrieve(batch.id)
    assert batch.request_counts is not None and batch.request_counts.completed == 4
    assert batch.output_file_id is not None
    for file_id in (file.id, batch.output_file_id):
        assert erin.files.retrieve(file_id).id == file_id
        for asks in (bob.files.retrieve, bob.files.content, bob.files.delete):
            with pytest.raises(openai.NotFoundError):
                asks(file_id)
    for asks in (bob.batches.retrieve, bob.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            asks(batch.id)
    with pytest.raises(openai.BadRequestError, match="No such File"):
        bob.batches.create(input_file_id=file.id, endpoint=TEXT, completion_window="24h")
    assert not bob.files.list().data and not bob.batches.list().data
    assert batch.id in [entry.id for entry in erin.batches.list().data]
    _, got, _ = ask(cluster, "/v1/models", method="GET", headers=bearer(ERIN))
    # A minute gives 1,000 tokens back.
    spent = 1000 - int(got["x-ratelimit-remaining-tokens"])
    assert 0 < spent <= 4 * 25


def test_a_limit_of_requests(cluster: EchoCluster) -> None:
    left = []
    for _ in range(3):
        status, got, _ = ask(cluster, TEXT, COMPLETION, headers=bearer(CAROL))
        assert status == 200 and got["x-ratelimit-limit-requests"] == "3"
        left.append(int(got["x-ratelimit-remaining-requests"]))
    assert left == [2, 1, 0]
    status, got, answer = ask(cluster, TEXT, COMPLETION, headers=bearer(CAROL))
    assert status == 429 and 1 <= int(got["retry-after"]) <= 20
    assert (answer["error"]["type"], answer["error"]["code"]) == ("requests", "rate_limit_exceeded")
    assert int(got["x-ratelimit-remaining-tokens"]) in range(1000 - 18, 1000)
    assert ask(cluster, "/v1/models", method="GET", headers=bearer(CAROL))[0] == 200  # asking costs nothing
    assert ask(cluster, TEXT, COMPLETION, headers=bearer(ALICE))[0] == 200


def test_a_limit_of_tokens_counts_prompt_and_answer(cluster: EchoCluster) -> None:
    body = {"prompt": "abcde", "max_tokens": 40, "stream": True}
    assert ask(cluster, TEXT, body, headers=bearer(DAVE))[0] == 200
    status, got, answer = ask(cluster, TEXT, COMPLETION, headers=bearer(DAVE))
    assert status == 429 and answer["error"]["type"] == "tokens"
    assert 25 <= int(got["retry-after"]) <= 32  # 45 used of 30: 16 to wait for, one in two seconds


def test_grpc(cluster: EchoCluster) -> None:
    with grpc.insecure_channel(cluster.grpc) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ServerMetadata",
            request_serializer=pb.ServerMetadataRequest.SerializeToString,
            response_deserializer=pb.ServerMetadataResponse.FromString,
        )
        for metadata in ((), (("authorization", "Bearer x"),)):
            with pytest.raises(grpc.RpcError) as caught:
                call(pb.ServerMetadataRequest(), metadata=metadata, timeout=10)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        for metadata in ((("authorization", f"Bearer {ALICE}"),), (("x-api-key", ALICE),)):
            assert call(pb.ServerMetadataRequest(), metadata=metadata, timeout=10).name
        live = channel.unary_unary(
            "/inference.GRPCInferenceService/ServerLive",
            request_serializer=pb.ServerLiveRequest.SerializeToString,
            response_deserializer=pb.ServerLiveResponse.FromString,
        )
        assert live(pb.ServerLiveRequest(), timeout=10).live


def test_tokens_over_grpc_are_charged(cluster: EchoCluster) -> None:
    key, record = make_key("erin", tokens_per_minute=5)
    path = cluster.run_dir / "keys.json"
    save(path, [ALICE_RECORD, BOB_RECORD, CAROL_RECORD, DAVE_RECORD, record])
    cluster.wait(lambda: ask(cluster, "/v1/models", method="GET", headers=bearer(key))[0] == 200)
    request = pb.ModelInferRequest(model_name="echo")
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(b"abcdefgh")
    with grpc.insecure_channel(cluster.grpc) as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        infer(request, metadata=(("x-api-key", key),), timeout=10)
        with pytest.raises(grpc.RpcError) as caught:
            infer(request, metadata=(("x-api-key", key),), timeout=10)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(caught.value.trailing_metadata())["retry-after"]) > 30


def test_origins(cluster: EchoCluster) -> None:
    asks = {"origin": "https://a.example", "access-control-request-method": "POST"}
    status, got, _ = ask(cluster, CHAT, method="OPTIONS", headers=asks)
    assert status == 200 and got["access-control-allow-origin"] == "https://a.example"
    status, got, _ = ask(cluster, TEXT, COMPLETION, headers={**bearer(ALICE), "origin": "https://b.example"})
    assert got["access-control-allow-origin"] == "https://b.example"
    _, got, _ = ask(cluster, TEXT, COMPLETION, headers={**bearer(ALICE), "origin": "https://evil.example"})
    assert "access-control-allow-origin" not in got


def test_hosts(cluster: EchoCluster) -> None:
    for host in ("api.example", "API.example:80"):
        assert ask(cluster, TEXT, COMPLETION, headers={**bearer(ALICE), "host": host})[0] == 200
    status, _, answer = ask(cluster, TEXT, COMPLETION, headers={**bearer(ALICE), "host": "rebound.example"})
    assert status == 421 and answer["error"]["code"] == "host_not_allowed"
    assert ask(cluster, "/health", method="GET", headers={"host": "10.0.0.7:8000"})[0] == 200  # of probes


def test_the_log_has_ids_and_no_secrets(cluster: EchoCluster) -> None:
    headers = {**bearer(ALICE), "x-request-id": "find-me"}
    ask(cluster, f"{CHAT}?token=private", chat("very-private", max_tokens=2), headers=headers)

    def lines() -> list[dict[str, object]]:
        return [json.loads(line) for line in cluster.front_log.read_text().splitlines() if line[:1] == "{"]

    def answered() -> list[dict[str, object]]:
        mine = [line for line in lines() if line.get("x_request_id") == "find-me"]
        return [line for line in mine if line["event"] == "answered"]

    cluster.wait(lambda: bool(answered()))
    [line] = answered()
    assert (line["method"], line["path"], line["status"], line["key"]) == ("POST", CHAT, 200, "alice")
    [accepted] = [line for line in lines() if line.get("x_request_id") == "find-me" and "call" in line]
    assert str(accepted["call"]).startswith("chatcmpl-")
    text = cluster.front_log.read_text()
    assert not any(secret in text for secret in (ALICE, BOB, CAROL, "private"))


def test_a_given_key_and_open_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHALANX_API_KEY", "one-for-all")
    with EchoCluster(tmp_path, front_options=("--open-metrics",)) as cluster:
        cluster.wait_serving(cluster.start_world())
        assert ask(cluster, "/metrics", method="GET")[0] == 200
        assert ask(cluster, "/v1/models", method="GET")[0] == 401
        assert ask(cluster, "/v1/models", method="GET", headers=bearer("one-for-all"))[0] == 200
        command = Path(f"/proc/{cluster.front.pid}/cmdline").read_bytes()
        assert b"one-for-all" not in command
