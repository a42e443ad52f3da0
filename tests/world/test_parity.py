"""The real model on this shape of world against transformers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.engine import Engine
from engine.plan import Chunk, SequenceParams, StepPlan
from engine.world import World
from tests import references
from tests.references import NUM_TOKENS, References
from tests.world import driver

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def engine(world: World) -> Engine:
    return driver.build(
        world, dtype="float32", max_num_seqs=32, max_num_batched_tokens=128, kv_cache_bytes=256 * 2**20
    )


def _check(run: driver.Run, oracle: References, world: World, names: list[int]) -> None:
    if world.at.is_sampler:
        for name in names:
            for index in range(NUM_TOKENS):
                position = len(oracle.prompts[name]) + index
                error = np.abs(run.logits[name, position] - oracle.logits[name, index]).max()
                assert error < 1e-3, f"prompt {name}, token {index}: logits differ by {error}"
    if world.at.rank == 0:
        for name in names:
            assert run.tokens[name] == oracle.tokens[name], f"prompt {name}"
            assert run.ends[name] == "length"


def test_batched_greedy_tokens_and_logits(world: World, engine: Engine, oracle: References) -> None:
    # Prompt 7 is longer than the token budget of 128, so it comes in chunks beside running sequences.
    requests = [driver.request(name, prompt, NUM_TOKENS) for name, prompt in enumerate(oracle.prompts)]
    run = driver.serve(world, engine, requests, record_logits=True)
    _check(run, oracle, world, list(range(len(requests))))


def test_unbatched_greedy_tokens_and_logits(world: World, engine: Engine, oracle: References) -> None:
    for name, prompt in enumerate(oracle.prompts):
        run = driver.serve(world, engine, [driver.request(name, prompt, NUM_TOKENS)], record_logits=True)
        _check(run, oracle, world, [name])


def test_replayed_request_goes_on_as_if_nothing_had_happened(
    world: World, engine: Engine, oracle: References
) -> None:
    emitted = {name: oracle.tokens[name][: 40 + 3 * name] for name in range(len(oracle.prompts))}
    requests = [
        driver.request(name, prompt, NUM_TOKENS, output=emitted[name])
        for name, prompt in enumerate(oracle.prompts)
    ]
    run = driver.serve(world, engine, requests)
    if world.at.rank == 0:
        for name in range(len(requests)):
            assert emitted[name] + run.tokens[name] == oracle.tokens[name], f"prompt {name}"


def test_preempted_request_goes_on_as_if_nothing_had_happened(
    world: World, engine: Engine, oracle: References
) -> None:
    names = [0, 1, 2, 3, 4, 5]
    requests = [driver.request(name, oracle.prompts[name], 32) for name in names]
    # Room for all prompts, but not for what the six sequences need at their ends.
    run = driver.serve(world, engine, requests, kv_blocks=12)
    if world.at.rank == 0:
        assert run.num_preemptions > 0, "the pool was meant to be too small"
        for name in names:
            assert run.tokens[name] == oracle.tokens[name][:32], f"prompt {name}"


def test_bfloat16_perplexity_is_that_of_transformers(world: World, oracle: References) -> None:
    if (world.at.tp, world.at.pp) not in ((1, 1), (2, 1), (1, 2), (2, 2)):
        pytest.skip("one shape of each kind says it; the others cost minutes")
    engine = driver.build(
        world, dtype="bfloat16", max_num_seqs=4, max_num_batched_tokens=512, kv_cache_bytes=128 * 2**20
    )
    runner = engine.runner
    logits: list[np.ndarray] = []
    num_blocks = -(-len(oracle.text) // 16)
    for begin in range(0, len(oracle.text), 512):
        tokens = oracle.text[begin : begin + 512]
        blocks = list(range(num_blocks)) if begin == 0 else []
        plan = StepPlan(
            step=1,
            slot=0,
            admitted=[(0, SequenceParams(0.0, 1.0, 0, 0, 0))] if begin == 0 else [],
            chunks=[Chunk(0, begin, tokens, blocks, None)],
        )
        with torch.inference_mode():
            # The plan draws from the chunk's last row alone.
            batch = replace(runner._table.apply(plan), wanted_rows=None)
            hidden = runner.forward(batch, plan.step)
            part = None if hidden is None else runner.logits(hidden, torch.arange(len(tokens)))
        if part is not None:
            logits.append(part.numpy())
    if world.at.is_sampler:
        ours = references.perplexity(np.concatenate(logits), oracle.text)
        assert ours == pytest.approx(oracle.bfloat16_perplexity, rel=0.01)
