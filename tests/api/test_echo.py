"""`phalanx serve echo`: a whole deployment without a model, for tests of clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.recovery.served import Served, processes_of


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder: Path = tmp_path_factory.mktemp("echo")
    with Served("echo", folder / "run", "--spare", "none") as served:
        yield served


def complete(served: Served, **body: object) -> httpx.Response:
    return httpx.post(f"{served.url}/v1/completions", json={"model": "echo", **body}, timeout=30)


def test_the_prompt_comes_back(served: Served) -> None:
    answer = complete(served, prompt="hello wörld, ", max_tokens=28).json()["choices"][0]
    assert (answer["text"], answer["finish_reason"]) == ("hello wörld, hello wörld, ", "length")


def test_a_conversation_brings_its_first_message_and_ends(served: Served) -> None:
    body = {"model": "echo", "messages": [{"role": "user", "content": "Say this."}]}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=30).json()["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == ("Say this.", "stop")


def test_a_stream_brings_token_by_token(served: Served) -> None:
    body = {"model": "echo", "prompt": "abc", "max_tokens": 7, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=30) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    assert [json.loads(line)["choices"][0]["text"] for line in lines] == list("abcabca")


def test_stop_strings_and_several_choices(served: Served) -> None:
    answer = complete(served, prompt="one two three", max_tokens=50, stop=[" three"], n=2).json()
    assert [choice["text"] for choice in answer["choices"]] == ["one two", "ne two"]


def test_what_it_cannot_do_is_refused_by_name(served: Served) -> None:
    answer = complete(served, prompt="a", max_tokens=2, response_format={"type": "json_object"})
    assert answer.status_code == 400
    assert "the echo model has no structured output" in answer.json()["error"]["message"]


def test_a_stream_outlives_its_rank(served: Served) -> None:
    world = served.active_world()
    text = "".join(f"word {number} " for number in range(30))
    body = {"model": "echo", "prompt": text, "max_tokens": len(text), "stream": True}
    brought: list[str] = []
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                brought += [choice["text"] for choice in json.loads(line[6:])["choices"]]
            if len(brought) == 20:
                next(p for p in processes_of(world) if p.pid == world["ranks"][0]["pid"]).kill()
                brought.append("")
    assert "".join(brought) == text
    assert served.active_world(above=world["epoch"])["epoch"] > world["epoch"]
