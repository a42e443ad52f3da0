"""What requests can ask for beside tokens, and what the prefix cache saves, on this shape of world."""

from __future__ import annotations

import re

import llguidance
import numpy as np
import pytest
from tokenizers import Tokenizer

from engine.engine import Engine
from engine.plan import LogitShaping
from engine.world import World
from tests import references
from tests.references import References
from tests.world import driver

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def engine(world: World) -> Engine:
    return driver.build(
        world, dtype="float32", max_num_seqs=8, max_num_batched_tokens=128, kv_cache_bytes=128 * 2**20
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))


def test_logprobs_of_output_and_prompt_are_those_of_transformers(
    world: World, engine: Engine, oracle: References
) -> None:
    text = oracle.text[:200]
    requests = [
        driver.request(0, oracle.prompts[0], 8, num_logprobs=3),
        # Two chunks, so that a prompt token's logits come from the chunk before.
        driver.request(1, text, 2, num_prompt_logprobs=2),
    ]
    run = driver.serve(world, engine, requests)
    if world.at.rank != 0:
        return
    generated = [token.logprobs for token in run.news if token.key[1] == "0"]
    expected = _log_softmax(oracle.logits[0, :8])
    for index, entry in enumerate(generated):
        assert entry is not None
        order = np.argsort(-expected[index])[:3]
        assert entry.top_token_ids == order.tolist()
        assert entry.top_logprobs == pytest.approx(expected[index, order], abs=1e-3)
        assert (entry.token_id, entry.rank) == (oracle.tokens[0][index], 1)
    with_prompt, after = (token for token in run.news if token.key[1] == "1")
    assert after.prompt_logprobs is None, "they come once"
    entries = with_prompt.prompt_logprobs
    assert entries is not None
    assert [entry.token_id for entry in entries] == text[1:]
    # The reference is kept in half precision.
    expected = _log_softmax(oracle.text_logits[:199])
    chosen = expected[np.arange(199), text[1:]]
    assert [entry.logprob for entry in entries] == pytest.approx(chosen, abs=0.03)
    assert all(len(entry.top_token_ids) == 2 for entry in entries)


def test_penalised_request_goes_on_after_a_replay_as_if_nothing_had_happened(
    world: World, engine: Engine, oracle: References
) -> None:
    shaping = LogitShaping(repetition_penalty=1.3, frequency_penalty=0.5, bad_words=[oracle.tokens[1][3:5]])

    def ask(output: list[int]) -> driver.Sequence:
        return driver.request(1, oracle.prompts[1], 24, output=output, shaping=shaping)

    whole = driver.serve(world, engine, [ask([])])
    replay = driver.serve(world, engine, [ask(whole.tokens.get(1, [])[:11])])
    if world.at.rank == 0:
        assert whole.tokens[1] != oracle.tokens[1][:24], "the penalties must matter"
        assert replay.tokens[1] == whole.tokens[1][11:]


def test_prefix_cache_changes_nothing_but_the_work(world: World, engine: Engine, oracle: References) -> None:
    prompt = oracle.prompts[7]
    twins = [driver.request(name, prompt, 12) for name in range(3)]
    late = driver.request(9, prompt + oracle.tokens[7][:4], 8, priority=1)
    run = driver.serve(world, engine, [*twins, late])
    if world.at.rank == 0:
        for name in range(3):
            assert run.tokens[name] == oracle.tokens[7][:12]
        assert run.tokens[9] == oracle.tokens[7][4:12]
        assert run.num_hit_tokens >= 2 * (len(prompt) // 16 - 1) * 16


def test_grammar_is_followed_and_a_replay_goes_on_inside_it(
    world: World, engine: Engine, oracle: References
) -> None:
    grammar = llguidance.LLMatcher.grammar_from_regex(r"[A-Z][a-z]{3,8}: [0-9]{4}-[0-9]{2}(, [a-z]{2,8}){3}")
    end = frozenset(engine.config.eos_token_ids)

    def ask(output: list[int]) -> driver.Sequence:
        sequence = driver.request(3, oracle.prompts[4], 60, 0.8, output=output, grammar=grammar)
        sequence.end_token_ids = end
        return sequence

    whole = driver.serve(world, engine, [ask([]), driver.request(5, oracle.prompts[5], 12)])
    replay = driver.serve(world, engine, [ask(whole.tokens.get(3, [])[:6])])
    if world.at.rank == 0:
        assert whole.tokens[5] == oracle.tokens[5][:12], "a neighbour's grammar must not matter"
        assert replay.tokens[3] == whole.tokens[3][6:]
        assert whole.ends[3] == "stop"
        tokenizer = Tokenizer.from_file(str(references.model_folder() / "tokenizer.json"))
        text = tokenizer.decode(whole.tokens[3])
        assert re.fullmatch(r"[A-Z][a-z]{3,8}: [0-9]{4}-[0-9]{2}(, [a-z]{2,8}){3}", text), text


def test_broken_grammar_ends_the_request_and_nothing_else(
    world: World, engine: Engine, oracle: References
) -> None:
    broken = driver.request(0, oracle.prompts[0], 20, grammar="start: (")
    broken.end_token_ids = frozenset(engine.config.eos_token_ids)
    run = driver.serve(world, engine, [broken, driver.request(1, oracle.prompts[1], 12)])
    if world.at.rank == 0:
        assert run.ends[0] == "stop"
        assert run.tokens[1] == oracle.tokens[1][:12]
