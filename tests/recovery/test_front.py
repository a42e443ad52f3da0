"""The front of a real deployment is killed in the middle of streams, also while no world is there: every client takes
its stream up again, and has in the end what an undisturbed one has."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import psutil
import pytest

from gateway.client import Client, GatewayError, SamplingParams
from tests import references
from tests.recovery.served import Served

NUM_TOKENS = 96
TIMEOUT_S = 240.0

GREEDY: dict[str, Any] = {
    "max_tokens": NUM_TOKENS,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}
HTTP_CASES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": references.PROMPTS[4]}),
    ("/v1/completions", {"prompt": references.PROMPTS[5], "n": 2, "logprobs": 2}),
    ("/v1/completions", {"prompt": references.PROMPTS[6], "stop": [" 97,", "zzz"]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Count to fifty in words."}]}),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "Three colours?"}],
            "n": 2,
            "logprobs": True,
            "top_logprobs": 1,
        },
    ),
]
ZMQ_PROMPTS = references.PROMPTS[4:7]


@dataclass
class Followed:
    """What one client saw of its stream over all its connections."""

    chunks: list[dict[str, Any]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    done: bool = False
    connections: int = 0
    error: str | None = None

    def of(self, index: int) -> list[dict[str, Any]]:
        return [c for chunk in self.chunks for c in chunk.get("choices", []) if c["index"] == index]

    def text(self, index: int) -> str:
        return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in self.of(index))

    def tokens(self, index: int) -> list[str]:
        """Names of the tokens, of those that ask for log-probabilities."""
        found: list[str] = []
        for choice in self.of(index):
            logprobs = choice["logprobs"] or {}
            found += logprobs.get("tokens") or [entry["token"] for entry in logprobs.get("content", [])]
        return found

    @property
    def usage(self) -> list[Any]:
        return [chunk["usage"] for chunk in self.chunks if chunk.get("usage")]


WITH_IDS = {"accept": "text/event-stream"}


class Addressed(Protocol):
    """What clients have to know of a deployment."""

    @property
    def url(self) -> str: ...


def follow(
    served: Addressed,
    path: str,
    body: dict[str, Any],
    followed: Followed,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Reads a stream to its end, and takes it up again whenever the connection breaks. `headers`: further ones."""
    deadline = time.monotonic() + TIMEOUT_S
    request_id = None
    while not followed.done and time.monotonic() < deadline:
        last = {**(headers or {}), **({"last-event-id": followed.ids[-1]} if followed.ids else {})}
        try:
            if request_id is None:
                own = {**WITH_IDS, **(headers or {})}
                stream = httpx.stream("POST", served.url + path, json=body, headers=own, timeout=60)
            else:
                url = f"{served.url}/v1/requests/{request_id}/stream"
                stream = httpx.stream("GET", url, headers=last, timeout=60)
            with stream as response:
                if response.status_code != 200:
                    followed.error = f"{response.status_code}: {response.read().decode()}"
                    return
                followed.connections += 1
                request_id = response.headers["x-phalanx-request-id"]
                event_id = ""
                for line in response.iter_lines():
                    if line.startswith("id: "):
                        event_id = line[4:]
                    elif line.startswith("data: "):
                        followed.ids.append(event_id)
                        if line == "data: [DONE]":
                            followed.done = True
                            return
                        followed.chunks.append(json.loads(line[6:]))
        except httpx.HTTPError:
            time.sleep(0.05)


@dataclass
class Collected:
    """What one ZeroMQ client saw."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    gaps: int = 0
    finish_reason: str | None = None
    error: str | None = None


def collect(client: Client, prompt: str, collected: Collected) -> None:
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    try:
        for output in client.submit(prompt, params):
            collected.gaps += output.position != len(collected.tokens)
            collected.tokens += output.token_ids
            collected.text += output.text or ""
            collected.finish_reason = output.finish_reason
    except GatewayError as error:
        collected.error = str(error)


class Clients:
    """Eight streams at once."""

    def __init__(self, served: Served) -> None:
        self.http = [Followed() for _ in HTTP_CASES]
        self.zmq = [Collected() for _ in ZMQ_PROMPTS]
        self._client = Client(served.ready_line.split()[3])
        self._client.connect()
        jobs: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
            (follow, (served, path, {**GREEDY, **body}, followed))
            for (path, body), followed in zip(HTTP_CASES, self.http, strict=True)
        ]
        jobs += [
            (collect, (self._client, prompt, collected))
            for prompt, collected in zip(ZMQ_PROMPTS, self.zmq, strict=True)
        ]
        self._threads = [threading.Thread(target=function, args=arguments) for function, arguments in jobs]
        for thread in self._threads:
            thread.start()

    def wait_for(self, pieces: int) -> None:
        """Until every stream has brought so many chunks or tokens, counted from its beginning."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            http = [len(f.chunks) for f in self.http if not f.done and f.error is None]
            zmq = [len(c.tokens) for c in self.zmq if c.finish_reason is None and c.error is None]
            if min([*http, *zmq], default=pieces) >= pieces:
                return
            assert time.monotonic() < deadline, (http, zmq)
            time.sleep(0.01)

    def finish(self) -> None:
        for thread in self._threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()
        self._client.close()


def kill_front(served: Served) -> None:
    front = served.front()
    front.kill()
    deadline = time.monotonic() + 60
    while True:
        try:
            if served.front().pid != front.pid and served.cluster()["front"]["pid"] != front.pid:
                return
        except (httpx.HTTPError, StopIteration, psutil.Error):
            pass  # on its way
        assert time.monotonic() < deadline, served.errors()
        time.sleep(0.02)


def check_same(disturbed: Clients, undisturbed: Clients, min_connections: int) -> None:
    for followed, plain, (path, body) in zip(disturbed.http, undisturbed.http, HTTP_CASES, strict=True):
        assert followed.error is None and plain.error is None, (followed.error, plain.error)
        assert followed.done and plain.done
        for index in range(body.get("n", 1)):
            assert followed.text(index) == plain.text(index) != "", (path, body, index)
            assert followed.tokens(index) == plain.tokens(index)
            finishes = [c["finish_reason"] for c in followed.of(index) if c["finish_reason"]]
            assert len(finishes) == 1
        if "logprobs" in body:
            assert len(followed.tokens(0)) == NUM_TOKENS
        # What the prefix cache had of the prompt is another thing each time.
        counts = [[one | {"prompt_tokens_details": None} for one in side.usage] for side in (followed, plain)]
        assert counts[0] == counts[1] and len(followed.usage) == 1
        assert followed.ids[-1] == plain.ids[-1]
        assert followed.connections >= min_connections
    for collected, other in zip(disturbed.zmq, undisturbed.zmq, strict=True):
        assert collected.error is None and collected == other
        assert len(collected.tokens) == NUM_TOKENS and collected.gaps == 0


@pytest.mark.parametrize("world", ["there", "gone"])
def test_streams_outlive_the_front(tmp_path: Path, world: str) -> None:
    flags = ["--tp", "2", "--dtype", "float32", "--kv-cache-memory", "128MiB", "--spare", "none"]
    with Served(references.MODEL, tmp_path, *flags) as served:
        undisturbed = Clients(served)
        undisturbed.finish()
        disturbed = Clients(served)
        disturbed.wait_for(8)
        if world == "gone":
            os.kill(served.active_world()["ranks"][1]["pid"], signal.SIGKILL)
            time.sleep(0.2)
        kill_front(served)
        disturbed.wait_for(30)
        kill_front(served)
        disturbed.finish()
        check_same(disturbed, undisturbed, min_connections=2)
        errors = (tmp_path / "front.log").read_text()
        assert errors.count('"event": "calls taken up"') == 2 and "Traceback" not in errors


def test_a_key_finds_its_request_before_and_after(tmp_path: Path) -> None:
    flags = ["--tp", "2", "--dtype", "float32", "--kv-cache-memory", "128MiB", "--spare", "none"]
    body = {"model": references.MODEL, "prompt": references.PROMPTS[4], "max_tokens": 64, "ignore_eos": True}
    key = {"idempotency-key": "one"}
    with Served(references.MODEL, tmp_path, *flags) as served:
        url = f"{served.url}/v1/completions"
        lost = threading.Thread(target=_post_and_lose, args=(url, body, key))
        lost.start()
        time.sleep(0.5)
        again: list[httpx.Response] = []
        attached = threading.Thread(
            target=lambda: again.append(httpx.post(url, json=body, headers=key, timeout=TIMEOUT_S))
        )
        attached.start()
        attached.join(TIMEOUT_S)
        lost.join(TIMEOUT_S)
        first = again[0].json()
        assert first["usage"]["completion_tokens"] == 64  # sampled, without a seed: the same only if attached

        other = {**body, "prompt": references.PROMPTS[5]}
        running = threading.Thread(target=_post_and_lose, args=(url, other, {"idempotency-key": "two"}))
        running.start()
        time.sleep(0.5)
        kill_front(served)
        running.join(TIMEOUT_S)
        assert httpx.post(url, json=body, headers=key, timeout=TIMEOUT_S).json() == first
        second = httpx.post(url, json=other, headers={"idempotency-key": "two"}, timeout=TIMEOUT_S)
        assert second.json()["usage"]["completion_tokens"] == 64
        shown = httpx.get(f"{served.url}/v1/requests/{second.headers['x-phalanx-request-id']}").json()
        assert shown["status"] == "completed" and shown["response"] == second.json()


def _post_and_lose(url: str, body: dict[str, Any], headers: dict[str, str]) -> None:
    try:
        httpx.post(url, json=body, headers=headers, timeout=1.0)
    except httpx.HTTPError:
        return
