"""A rank dies while it makes an answer that was asked for in every way: the client sees the answer that it would
have seen, once."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.api.conftest import MODEL
from tests.recovery.served import Served

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 10, "maxLength": 40},
        "chapters": {
            "type": "array",
            "items": {"type": "string", "minLength": 12, "maxLength": 40},
            "minItems": 8,
            "maxItems": 8,
        },
    },
    "required": ["title", "chapters"],
    "additionalProperties": False,
}


def read(api: openai.OpenAI, kill: int | None = None) -> tuple[str, list[tuple[str, list[int]]], list[float]]:
    """The text of a stream, its tokens with their bytes, and their log-probabilities; the process `kill` is killed
    after 12 chunks."""
    stream = api.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Invent a book."}],
        stream=True,
        seed=7,
        temperature=0.9,
        max_tokens=400,
        frequency_penalty=0.4,
        presence_penalty=0.3,
        logprobs=True,
        top_logprobs=2,
        response_format={"type": "json_schema", "json_schema": {"name": "book", "schema": SCHEMA}},
        extra_body={"repetition_penalty": 1.1, "min_p": 0.02, "bad_words": ["book"]},
    )
    text, tokens, logprobs = "", [], []
    for number, chunk in enumerate(stream):
        [choice] = chunk.choices
        text += choice.delta.content or ""
        for entry in (choice.logprobs and choice.logprobs.content) or ():
            tokens.append((entry.token, list(entry.bytes or ())))
            logprobs.append(entry.logprob)
        if number == 12 and kill is not None:
            os.kill(kill, signal.SIGKILL)
    return text, tokens, logprobs


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_does_not_show(tmp_path: Path, rank: int) -> None:
    flags = ("--tp", "2", "--dtype", "float32", "--max-model-len", "2048", "--kv-cache-memory", "128MiB")
    with Served(MODEL, tmp_path, *flags) as served:
        api = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120)
        text, tokens, logprobs = read(api)
        book: Any = json.loads(text)
        assert len(book["chapters"]) == 8 and "book" not in text
        assert b"".join(bytes(content) for _, content in tokens[:-1]).decode() == text
        world = served.active_world()
        again = read(api, kill=world["ranks"][rank]["pid"])
        assert served.active_world(above=world["epoch"])["epoch"] > world["epoch"]
        assert again[:2] == (text, tokens)
        assert again[2] == pytest.approx(logprobs, abs=2e-3)

        scored = {"prompt": text[:80], "max_tokens": 1, "echo": True, "logprobs": 0, "temperature": 0}
        answer = api.completions.create(model=MODEL, **scored)  # type: ignore[call-overload]
        assert len(answer.choices[0].logprobs.tokens) == answer.usage.total_tokens


def three_poems(api: openai.OpenAI, kill: int | None = None) -> tuple[list[str], list[str | None]]:
    """The texts of three seeded choices and how each ended; the process `kill` is killed while all three run."""
    stream = api.completions.create(
        model=MODEL,
        prompt="The sea is",
        n=3,
        seed=11,
        temperature=0.8,
        max_tokens=120,
        stop=["\n\n", ". The "],
        stream=True,
        extra_body={"min_tokens": 40},
    )
    texts, ends = [""] * 3, [None] * 3
    for number, chunk in enumerate(stream):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason or ends[choice.index]
        if number == 45 and kill is not None:
            os.kill(kill, signal.SIGKILL)
    return texts, ends


def test_choices_and_their_stop_strings_go_on(tmp_path: Path) -> None:
    flags = ("--tp", "2", "--dtype", "float32", "--max-model-len", "2048", "--kv-cache-memory", "128MiB")
    with Served(MODEL, tmp_path, *flags) as served:
        api = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120)
        undisturbed = three_poems(api)
        assert len(set(undisturbed[0])) == 3 and None not in undisturbed[1]
        world = served.active_world()
        assert three_poems(api, kill=world["ranks"][1]["pid"]) == undisturbed
        assert served.active_world(above=world["epoch"])["epoch"] > world["epoch"]
