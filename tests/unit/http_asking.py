"""How the HTTP tests ask a front, and how they read its streams."""

from __future__ import annotations

import http.client
import json
from typing import Any

from tests.echo_world import EchoCluster, echo_cached

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

Answer = tuple[int, dict[str, str], Any]


def ask(
    cluster: EchoCluster,
    path: str,
    body: object = None,
    *,
    method: str = "POST",
    headers: dict[str, str] | None = None,
) -> Answer:
    """Status, headers in lower case, and the JSON of the answer (bytes if it is none). Streams have ids."""
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=30)
    connection.request(method, path, content, {"accept": "text/event-stream", **(headers or {})})
    response = connection.getresponse()
    data = response.read()
    connection.close()
    lower = {name.lower(): value for name, value in response.getheaders()}
    is_json = lower.get("content-type") == "application/json"
    return response.status, lower, json.loads(data) if is_json else data


def chat(text: str = "hi", **fields: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}], **fields}


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, object]:
    """The usage of a request with one prompt in an echo world."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": echo_cached(prompt_tokens)},
    }


def events(data: bytes) -> list[Any]:
    """The JSON of each event of a stream, checked for its frame."""
    return [json.loads(content) for _, content in events_with_ids(data)]


def events_with_ids(data: bytes) -> list[tuple[str, bytes]]:
    """Id and data of each event of a whole stream but the last, which is checked."""
    parts = parse_events(data)
    assert parts[-1][1] == b"[DONE]"
    return parts[:-1]


def parse_events(data: bytes) -> list[tuple[str, bytes]]:
    """Id and data of each complete event of a piece of a stream; comments are left out."""
    parsed = []
    for part in data.split(b"\n\n")[:-1]:
        first, second = [line for line in part.split(b"\n") if not line.startswith(b":")]
        assert first.startswith(b"id: ") and second.startswith(b"data: "), part
        parsed.append((first[4:].decode(), second[6:]))
    return parsed
