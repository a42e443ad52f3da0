"""The public face for Python users, over the real processes."""

from __future__ import annotations

import pytest

import phalanx
from tests import references


def test_offline_generation_keeps_the_order_and_gives_what_transformers_gives() -> None:
    oracle = references.load()
    greedy = phalanx.SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    with phalanx.LLM(references.MODEL, tp=2, dtype="float32", max_num_seqs=4) as llm:
        prompts = [*oracle.prompts[:7], "The capital of France is"]
        answers = llm.generate(prompts, greedy, show_progress=False)
        single = llm.generate("The capital of France is", greedy, show_progress=False)
    assert [answer.token_ids for answer in answers[:7]] == [tokens[:12] for tokens in oracle.tokens[:7]]
    assert "Paris" in answers[7].text
    assert single[0].token_ids == answers[7].token_ids


def test_a_refused_prompt_is_an_error_that_says_what_is_allowed() -> None:
    with (
        phalanx.LLM(references.MODEL, max_model_len=64) as llm,
        pytest.raises(phalanx.RequestFailed, match="64"),
    ):
        llm.generate([[5] * 60], phalanx.SamplingParams(max_tokens=10), show_progress=False)


def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(phalanx.ServerError, match="--tp 10 is not possible"):
        phalanx.serve(references.MODEL, tp=10)


def test_a_server_that_died_is_noticed_at_the_end() -> None:
    server = phalanx.serve(references.MODEL)
    server._process.kill()
    server._process.wait()
    with pytest.raises(phalanx.ServerError, match="exit code -9"):
        server.close()
