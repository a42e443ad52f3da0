"""`deterministic` in bfloat16: a request's logits have the same bits whatever happens around it and to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.engine import Engine
from engine.world import World
from tests.references import References
from tests.world import driver

pytestmark = pytest.mark.mpi

NUM_TOKENS = 20
SUBJECTS = (0, 4, 7)
"""Prompts that are watched; 7 is long enough to come in chunks."""
CONTEXT = 1000
"""Added to the name of what only keeps the engine busy."""


def _engine(world: World, max_num_batched_tokens: int) -> Engine:
    return driver.build(
        world,
        dtype="bfloat16",
        deterministic=True,
        max_num_seqs=16,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_bytes=64 * 2**20,
    )


@pytest.fixture(scope="module")
def engine(world: World) -> Engine:
    if (world.at.tp, world.at.pp) in ((1, 2), (1, 3)):
        pytest.skip("what stages add, (2, 2) has too")
    return _engine(world, 512)


def _subject(name: int, oracle: References, output: list[int] | None = None) -> driver.Sequence:
    # One of them greedy, two seeded.
    temperature = 0.0 if name == 0 else 0.9
    return driver.request(
        name, oracle.prompts[name], NUM_TOKENS, temperature, output=output, top_p=0.95, top_k=200
    )


@pytest.fixture(scope="module")
def undisturbed(world: World, engine: Engine, oracle: References) -> dict[int, driver.Run]:
    """Each of them alone."""
    return {
        name: driver.serve(world, engine, [_subject(name, oracle)], record_logits=True) for name in SUBJECTS
    }


def _check(world: World, undisturbed: dict[int, driver.Run], run: driver.Run) -> None:
    for name, alone in undisturbed.items():
        if world.at.rank == 0:
            assert run.tokens[name] == alone.tokens[name], f"request {name}"
        for (seed, position), logits in run.logits.items():
            if seed == name:
                assert np.array_equal(logits, alone.logits[name, position]), f"{name}, position {position}"


def test_in_a_batch(
    world: World, engine: Engine, oracle: References, undisturbed: dict[int, driver.Run]
) -> None:
    random = np.random.default_rng(5)
    for _ in range(2):
        mates = [
            driver.request(
                CONTEXT + mate,
                oracle.text[mate : mate + int(random.integers(1, 150))],
                int(random.integers(1, NUM_TOKENS)),
                1.0,
            )
            for mate in random.choice(500, 10, replace=False).tolist()
        ]
        requests = [*mates, *(_subject(name, oracle) for name in SUBJECTS)]
        random.shuffle(requests)  # type: ignore[arg-type]
        run = driver.serve(world, engine, requests, record_logits=True)
        _check(world, undisturbed, run)


def test_in_chunks(
    world: World, engine: Engine, oracle: References, undisturbed: dict[int, driver.Run]
) -> None:
    for small in [_engine(world, budget) for budget in (16, 37)]:
        run = driver.serve(world, small, [_subject(name, oracle) for name in SUBJECTS], record_logits=True)
        _check(world, undisturbed, run)


def test_with_a_shared_prefix(
    world: World, engine: Engine, oracle: References, undisturbed: dict[int, driver.Run]
) -> None:
    # The first one computes the blocks that the second finds.
    first = driver.request(CONTEXT, oracle.prompts[7], 2)
    later = driver.request(7, oracle.prompts[7], NUM_TOKENS, 0.9, priority=1, top_p=0.95, top_k=200)
    fillers = [driver.request(CONTEXT + 1 + i, oracle.prompts[5], 4 + i) for i in range(15)]
    run = driver.serve(world, engine, [first, *fillers, later], record_logits=True)
    if world.at.rank == 0:
        assert run.num_hit_tokens > 0
        assert run.tokens[7] == undisturbed[7].tokens[7]
    for (seed, position), logits in run.logits.items():
        if seed == 7:
            assert np.array_equal(logits, undisturbed[7].logits[7, position])


def test_preempted(
    world: World, engine: Engine, oracle: References, undisturbed: dict[int, driver.Run]
) -> None:
    mates = [driver.request(CONTEXT + mate, oracle.prompts[mate], 32) for mate in (1, 2, 3, 5, 6)]
    # Late in the order of service, and so the first to be preempted.
    requests = [*mates, _subject(0, oracle), _subject(4, oracle)]
    run = driver.serve(world, engine, requests, record_logits=True, kv_blocks=13)
    if world.at.rank == 0:
        assert run.num_preemptions > 0, "the pool was meant to be too small"
    _check(world, {name: undisturbed[name] for name in (0, 4)}, run)


def test_replayed_from_every_position(
    world: World, engine: Engine, oracle: References, undisturbed: dict[int, driver.Run]
) -> None:
    for name in SUBJECTS:
        tokens = undisturbed[name].tokens.get(name, [0] * NUM_TOKENS)
        replays = []
        for count in range(1, NUM_TOKENS):
            replay = _subject(name, oracle, output=tokens[:count])
            replay.key = (b"test", str(count))
            replays.append(replay)
        run = driver.serve(world, engine, replays, record_logits=True)
        for count in range(1, NUM_TOKENS):
            if world.at.rank == 0:
                assert run.tokens[count] == tokens[count:], f"request {name}, replayed after {count} tokens"
        for (_, position), logits in run.logits.items():
            assert np.array_equal(logits, undisturbed[name].logits[name, position])


def test_sums_are_taken_in_the_order_of_the_ranks(world: World, engine: Engine) -> None:
    def part(rank: int, count: int) -> torch.Tensor:
        return torch.randn(200_000, generator=torch.Generator().manual_seed(rank))[:count].clone()

    for count in (1, 7, 576, 4000, 199_999):
        expected = part(0, count)
        for rank in range(1, world.at.tp):
            expected += part(rank, count)
        found = world.tensor_group.reduced(part(world.at.tp_rank, count).view(1, count))
        assert torch.equal(found, expected.view(1, count))
