"""Clients that read streams without knowing what server-sent events are: each line, or each block, is `data: ...`.

The loops do what the benchmark clients of vLLM (blocks) and SGLang (lines) do with what they receive.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator

import pytest

from tests.echo_world import EchoCluster
from tests.unit.http_asking import CHAT, TEXT, chat, usage_of

pytestmark = pytest.mark.slow

PROMPT = {"prompt": "abcdefgh", "max_tokens": 30, "stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    with EchoCluster(tmp_path_factory.mktemp("run"), step_s=0.001) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


def raw_stream(cluster: EchoCluster, path: str, body: object, headers: dict[str, str]) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=30)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json", **headers})
    response = connection.getresponse()
    assert response.status == 200
    return response.read()


def read_lines(data: bytes) -> list[dict[str, object]]:
    """Every line that is not blank is an event."""
    chunks = []
    for line in data.split(b"\n"):
        text = line.strip().decode().removeprefix("data: ")
        if text and text != "[DONE]":
            chunks.append(json.loads(text))
    return chunks


def read_blocks(data: bytes) -> list[dict[str, object]]:
    """Every block that is no comment is an event."""
    chunks = []
    for block in data.decode().split("\n\n"):
        text = block.strip()
        if text and not text.startswith(":") and text.removeprefix("data: ") != "[DONE]":
            chunks.append(json.loads(text.removeprefix("data: ")))
    return chunks


@pytest.mark.parametrize("accept", [{}, {"accept": "*/*"}, {"accept": "application/json"}])
def test_lines_and_blocks_are_all_data(cluster: EchoCluster, accept: dict[str, str]) -> None:
    data = raw_stream(cluster, TEXT, PROMPT, accept)
    for chunks in (read_lines(data), read_blocks(data)):
        text = "".join(c["text"] for chunk in chunks for c in chunk["choices"])  # type: ignore[attr-defined]
        assert text == ("abcdefgh" * 4)[:30]
        assert chunks[-1]["usage"] == usage_of(8, 30)
    chunks = read_lines(raw_stream(cluster, CHAT, chat("abc", stream=True, max_tokens=5), accept))
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"  # type: ignore[index]


@pytest.mark.parametrize(
    "headers", [{"accept": "text/event-stream"}, {"idempotency-key": "k1"}, {"x-on-disconnect": "continue"}]
)
def test_who_asks_for_ids_has_them(cluster: EchoCluster, headers: dict[str, str]) -> None:
    blocks = raw_stream(cluster, TEXT, PROMPT, headers).split(b"\n\n")[:-1]
    assert blocks and all(block.startswith(b"id: ") and b"\ndata: " in block for block in blocks)
