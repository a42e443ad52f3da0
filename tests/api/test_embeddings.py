"""Embeddings and scores of a real world: equal to transformers' over HTTP, ZeroMQ and offline, and over a death."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest

import phalanx
from tests import pooling_references, references
from tests.api.conftest import MODEL
from tests.pooling_references import PoolingReference
from tests.recovery.served import Served


@pytest.fixture(scope="module")
def pooled() -> list[PoolingReference]:
    return pooling_references.load()


def test_over_http_and_zmq(api: openai.OpenAI, zmq_endpoint: str, pooled: list[PoolingReference]) -> None:
    prompts = [reference.prompt for reference in pooled]
    answer = api.embeddings.create(model=MODEL, input=prompts)
    assert answer.usage.prompt_tokens == sum(map(len, prompts))
    for entry, reference in zip(answer.data, pooled, strict=True):
        assert np.abs(entry.embedding - reference.normalized("last")).max() < 1e-3
    mean = api.embeddings.create(model=MODEL, input=prompts, dimensions=64, extra_body={"pooling": "mean"})
    for entry, reference in zip(mean.data, pooled, strict=True):
        head = reference.normalized("mean")[:64]
        assert np.abs(entry.embedding - head / np.linalg.norm(head)).max() < 1e-3
    with phalanx.Client(zmq_endpoint) as client:
        for reference in pooled:
            half = len(reference.prompt) // 2
            scores = client.score(reference.prompt[:half], reference.prompt[half:])
            assert np.abs(scores - reference.scores[half - 1 :]).max() < 1e-3


def test_offline(pooled: list[PoolingReference]) -> None:
    with phalanx.LLM(references.MODEL, dtype="float32", max_model_len=1024) as llm:
        found = llm.embed([reference.prompt for reference in pooled], kind="mean", normalize=False)
        for numbers, reference in zip(found, pooled, strict=True):
            assert np.abs(numbers - reference.mean).max() < 1e-3
        [scores] = llm.score([pooled[1].prompt[:4]], [pooled[1].prompt[4:]], show_progress=False)
        assert np.abs(scores - pooled[1].scores[3:]).max() < 1e-3
        likely, unlikely = llm.score("The capital of France is", [" Paris", " banana"])
        assert sum(likely) > sum(unlikely)


@pytest.mark.parametrize("flags", [("--tp", "2"), ("--pp", "2")], ids=["tp2", "pp2"])
def test_a_killed_rank_does_not_show(
    tmp_path: Path, pooled: list[PoolingReference], flags: tuple[str, str]
) -> None:
    # Small steps, so that the ranks die in the middle of long prompts.
    limits = ("--dtype", "float32", "--max-model-len", "1024", "--max-num-batched-tokens", "64")
    with Served(MODEL, tmp_path, *flags, *limits) as served:
        api = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=180)
        world = served.active_world()
        prompts = [reference.prompt for reference in pooled] * 4
        # Every prompt begins otherwise, so that none finds another's blocks.
        prompts = [[100 + number, *prompt] for number, prompt in enumerate(prompts)]

        def embed(kind: str) -> list[list[float]]:
            extra = {"pooling": kind}
            answer = api.embeddings.create(model=MODEL, input=prompts, extra_body=extra)
            return [entry.embedding for entry in answer.data]

        undisturbed = [embed("last"), embed("mean")]
        with ThreadPoolExecutor(2) as threads:
            killer = threading.Timer(1.0, os.kill, (world["ranks"][1]["pid"], signal.SIGKILL))
            killer.start()
            found = list(threads.map(embed, ("last", "mean")))
        assert served.active_world(above=world["epoch"])["epoch"] > world["epoch"]
        for ours, expected in zip(found, undisturbed, strict=True):
            assert np.abs(np.array(ours) - np.array(expected)).max() < 1e-3
