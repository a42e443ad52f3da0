"""Many requests on one world: seeds, batches, cancels, and what is left afterwards."""

from __future__ import annotations

import pytest

from engine.engine import Engine
from engine.world import World
from tests.references import References
from tests.world import driver

pytestmark = pytest.mark.mpi

NUM_TOKENS = 16


@pytest.fixture(scope="module")
def engine(world: World) -> Engine:
    return driver.build(
        world, dtype="float32", max_num_seqs=32, max_num_batched_tokens=256, kv_cache_bytes=256 * 2**20
    )


def _seeded(name: int, oracle: References) -> driver.Sequence:
    prompt = oracle.prompts[name % 7]
    return driver.request(
        name, prompt, NUM_TOKENS, temperature=1.0, top_p=0.95 if name % 2 else 1.0, top_k=50
    )


def test_seeded_request_gives_the_same_tokens_alone_in_a_batch_and_after_a_replay(
    world: World, engine: Engine, oracle: References
) -> None:
    names = list(range(100, 116))
    batched = driver.serve(world, engine, [_seeded(name, oracle) for name in names])
    alone = [driver.serve(world, engine, [_seeded(name, oracle)]) for name in names[:3]]
    replays = []
    for name in names[:3]:
        sequence = _seeded(name, oracle)
        sequence.tokens += batched.tokens.get(name, [])[:8]
        replays.append(driver.serve(world, engine, [sequence]))
    if world.at.rank == 0:
        for name, run, replay in zip(names[:3], alone, replays, strict=True):
            assert run.tokens[name] == batched.tokens[name]
            assert replay.tokens[name] == batched.tokens[name][8:]
        same_prompt = [batched.tokens[name] for name in (101, 108, 115)]
        assert len({tuple(tokens) for tokens in same_prompt}) == 3, "other seeds must give other tokens"


def test_32_streams_complete_and_cancelled_ones_free_their_blocks(
    world: World, engine: Engine, oracle: References
) -> None:
    requests = [driver.request(name, oracle.prompts[name % 7], 8 + name % 5) for name in range(32)]
    cancels = {name: 2 + name % 5 for name in range(0, 32, 4)}
    # `serve` itself checks that every block and handle is free at the end.
    run = driver.serve(world, engine, requests, cancel_after=cancels)
    if world.at.rank == 0:
        for name in range(32):
            if name in cancels:
                assert run.ends[name] == "cancelled"
                assert cancels[name] <= len(run.tokens[name]) < 8 + name % 5
            else:
                assert run.ends[name] == "length"
                assert len(run.tokens[name]) == 8 + name % 5
                count = min(len(run.tokens[name]), NUM_TOKENS)
                assert run.tokens[name][:count] == oracle.tokens[name % 7][:count]


def test_every_pipeline_stage_has_a_batch_of_its_own(
    world: World, engine: Engine, oracle: References
) -> None:
    run = driver.serve(world, engine, [driver.request(name, oracle.prompts[name], 8) for name in range(6)])
    if world.at.rank == 0:
        # Without a pipeline rank 0 samples itself, and nothing is outstanding between two steps.
        assert run.most_outstanding_plans == (world.at.pp if world.at.pp > 1 else 0)
        assert [run.tokens[name] for name in range(6)] == [tokens[:8] for tokens in oracle.tokens[:6]]


def test_more_requests_than_may_run_wait_their_turn(world: World, oracle: References) -> None:
    small = driver.build(
        world, dtype="float32", max_num_seqs=3, max_num_batched_tokens=64, kv_cache_bytes=64 * 2**20
    )
    run = driver.serve(world, small, [driver.request(name, oracle.prompts[name], 6) for name in range(8)])
    if world.at.rank == 0:
        assert [run.tokens[name] for name in range(8)] == [tokens[:6] for tokens in oracle.tokens]
