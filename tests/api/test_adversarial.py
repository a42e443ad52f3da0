"""No request can kill a world by its size: everything that is large, at once and again, on a small real world."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import phalanx
from tests.api.test_long_soak import engine_state, memory
from tests.recovery.served import Served
from tests.tiny_models import make_tiny_llama

LENGTH = 512
GROWTH_BYTES = {"front": 96 * 2**20, "rank": 16 * 2**20}
"""That a process may grow by from the second round to the third. The front has bodies and answers of tens of
megabytes in its hands, of which its allocator keeps now more, now less: over many rounds it went up and down by
42 MiB."""
CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"

Attack = tuple[str, dict[str, Any]]


def attacks() -> dict[str, Attack]:
    """By name: where it goes and what it asks."""
    whole = [5] * (LENGTH - 1)
    wide: dict[str, Any] = {
        "type": "object",
        "properties": {f"p{i}": {"type": "string", "pattern": "[a-z]{1,50}"} for i in range(900)},
    }
    nested: dict[str, Any] = {"type": "integer"}
    for _ in range(400):
        nested = {"type": "array", "items": nested}
    long_text = {"prompt": whole, "max_tokens": 1}
    return {
        "a prompt of a million tokens": (TEXT, {"prompt": [5] * 1_000_000}),
        "a prompt of ten million characters": (TEXT, {"prompt": "x" * 10_000_000}),
        "a body that is too long": (TEXT, {"prompt": "x" * 17_000_000}),
        "1000 prompts": (TEXT, {"prompt": [[5, 6, 7 + i % 200] for i in range(1000)], "max_tokens": 1}),
        "1000 long prompts": (TEXT, {"prompt": [whole] * 1000, "max_tokens": 1}),
        "10,000 prompts": (TEXT, {"prompt": ["x"] * 10_000}),
        "1000 prompts, many choices": (TEXT, {"prompt": ["x"] * 1000, "n": 128}),
        "128 choices": (TEXT, {"prompt": "x", "n": 128, "max_tokens": 20}),
        "128 streams of 128 choices": (TEXT, {"prompt": "x", "n": 128, "max_tokens": 20, "stream": True}),
        "best of 128": (TEXT, {"prompt": "x", "best_of": 128, "max_tokens": 5}),
        "more tokens than fit": (TEXT, {"prompt": "x", "max_tokens": 2**40}),
        "all logprobs": (TEXT, {"prompt": whole, "max_tokens": 1, "logprobs": 20, "echo": True}),
        "prompt logprobs of 60 long prompts": (
            TEXT,
            {**long_text, "prompt": [whole] * 60, "prompt_logprobs": 20},
        ),
        "echo of 128 choices in a stream": (
            TEXT,
            {**long_text, "n": 128, "logprobs": 20, "echo": True, "stream": True},
        ),
        "logprobs of everything": (TEXT, {"prompt": ["x"] * 8, "max_tokens": 500, "n": 128, "logprobs": 20}),
        "a slow schema": (CHAT, {"guided_json": {"type": "integer", "multipleOf": 999_983}}),
        "a wide schema": (CHAT, {"guided_json": wide, "max_tokens": 20}),
        "a deep schema": (CHAT, {"guided_json": nested, "max_tokens": 20}),
        "a long regex": (CHAT, {"guided_regex": "(a{1,1000}){1,1000}", "max_tokens": 20}),
        "an automaton that explodes": (CHAT, {"guided_regex": ".*a.{20}", "max_tokens": 20}),
        "an ambiguous grammar": (CHAT, {"guided_grammar": 'start: s\ns: s s | "a" | "b"', "max_tokens": 20}),
        "4000 choices": (CHAT, {"guided_choice": [f"w{i}" for i in range(4000)], "max_tokens": 5}),
        "a giant grammar": (CHAT, {"guided_grammar": "start: " + '"a" ' * 1_000_000}),
        "a nest of brackets": (CHAT, {"guided_grammar": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000}),
        "many bad words": (TEXT, {"prompt": "x", "bad_words": ["y" * 256] * 128, "max_tokens": 20}),
        "too many bad words": (TEXT, {"prompt": "x", "bad_words": ["y"] * 100_000}),
        "all biases": (
            TEXT,
            {"prompt": "x", "logit_bias": {str(i): 1 for i in range(384)}, "max_tokens": 20},
        ),
        "too many biases": (TEXT, {"prompt": "x", "logit_bias": {str(i): 1 for i in range(200_000)}}),
        "long stop strings": (TEXT, {"prompt": "x", "stop": ["y" * 4096] * 16, "max_tokens": 20}),
        "a giant stop string": (TEXT, {"prompt": "x", "stop": "y" * 5_000_000}),
        "many stop tokens": (TEXT, {"prompt": "x", "stop_token_ids": [7] * 100_000}),
        "2048 embeddings": (EMBED, {"input": [[5, 6 + i % 250] for i in range(2048)]}),
        "1000 embeddings": (EMBED, {"input": [[5, 6 + i % 250] for i in range(1000)]}),
        "embeddings of 1000 long inputs": (EMBED, {"input": [whole] * 1000, "pooling": "mean"}),
    }


def run(url: str, attack: Attack) -> int:
    """The status of the answer, read to its end. What is refused says why, and what is allowed."""
    path, body = attack
    if path == CHAT:
        body = {"messages": [{"role": "user", "content": "x"}], **body}
    answer = httpx.post(url + path, content=json.dumps(body), timeout=300)
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert answer.status_code in (400, 413, 429), (answer.status_code, error)
        assert error["message"] and len(error["message"]) < 2000
        if answer.status_code == 429:
            assert 1 <= int(answer.headers["retry-after"]) <= 60
    return answer.status_code


def zmq_attacks(endpoint: str) -> None:
    """What only the ZeroMQ server can be asked."""
    with phalanx.Client(endpoint) as client:
        for params in (
            phalanx.SamplingParams(bad_words=[[5] * 1_000_000]),
            phalanx.SamplingParams(bad_words=[[5]] * 1000),
            phalanx.SamplingParams(logit_bias=dict.fromkeys(range(100_000), 1.0)),
            phalanx.SamplingParams(grammar="start: " + '"a" ' * 20_000),
            phalanx.SamplingParams(stop_token_ids=[7] * 1000),
        ):
            # Refused as a whole, or by name: either way the connection and the server live.
            stream = client.submit([5, 6], params, timeout_s=2)
            with pytest.raises((phalanx.RequestFailed, TimeoutError)):
                stream.collect()
        for prompt in ([5] * 1_000_000, "x" * 10_000_000):
            with pytest.raises(phalanx.RequestFailed) as failure:
                client.generate(prompt)
            assert failure.value.code == "invalid_request"
        with pytest.raises(phalanx.RequestFailed):
            client.score([5] * LENGTH, [6])
        assert len(client.score([5], [6] * (LENGTH - 1))) == LENGTH - 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--tp", "2"), id="tp2"),
        pytest.param(("--pp", "2"), id="pp2", marks=pytest.mark.long),
    ],
)
def test_nothing_kills_a_world_by_its_size(tmp_path: Path, flags: tuple[str, str]) -> None:
    folder = make_tiny_llama(tmp_path / "model", max_model_len=LENGTH)
    limits = ("--dtype", "float32", "--max-num-seqs", "32", "--spare", "none", "--kv-cache-memory", "8MiB")
    with Served(str(folder), tmp_path / "run", *flags, *limits) as served:
        endpoint = re.search(r"zmq (\S+)", served.ready_line)[1]  # type: ignore[index]
        epoch = served.active_world()["epoch"]
        every = attacks()
        # In peace, each alone: what fits is answered, what never fits is refused.
        alone = {name: run(served.url, every[name]) for name in every}
        answered = [name for name, status in alone.items() if status == 200]
        for name in (
            "1000 prompts",
            "128 choices",
            "best of 128",
            "all logprobs",
            "4000 choices",
            "1000 embeddings",
        ):
            assert name in answered, alone
        for name in ("a prompt of a million tokens", "10,000 prompts", "a slow schema", "a giant grammar",
                     "too many biases", "a giant stop string", "logprobs of everything"):  # fmt: skip
            assert alone[name] == 400, alone
        assert alone["a body that is too long"] == 413
        sizes = []
        for _ in range(3):  # all at once
            with ThreadPoolExecutor(6) as threads:
                of_zmq = threads.submit(zmq_attacks, endpoint)
                statuses = list(threads.map(lambda attack: run(served.url, attack), every.values()))
                of_zmq.result()
            deadline = time.monotonic() + 60
            while any(engine_state(served.url).values()) and time.monotonic() < deadline:
                time.sleep(0.2)
            assert not any(engine_state(served.url).values()), engine_state(served.url)
            sizes.append(memory(served))
            print(
                Counter(statuses), {name: size >> 20 for name, size in sizes[-1].items()}, "MiB", flush=True
            )
        assert served.active_world()["epoch"] == epoch and served.cluster()["faults"] == []
        growth = {name: sizes[2][name] - sizes[1][name] for name in sizes[2]}
        for name, grown in growth.items():
            assert grown < GROWTH_BYTES[name.split()[0]], growth
