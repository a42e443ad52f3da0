"""Ranks that find different kernels agree on some that all of them have."""

from __future__ import annotations

import pytest

from engine.kernels.library import instruction_sets
from engine.world import World
from tests.references import References
from tests.world import driver

pytestmark = pytest.mark.mpi

LONG = 330
"""Tokens of a prompt that is computed in pieces, which are cut by the instruction set."""


@pytest.mark.parametrize("weaker", ["portable", "off"])
def test_the_weakest_rank_decides(world: World, oracle: References, weaker: str) -> None:
    best = instruction_sets()[0]
    if best == "portable":
        pytest.skip("there is one instruction set here")
    is_weaker = world.at.rank == world.at.tp * world.at.pp - 1
    engine = driver.build(
        world,
        dtype="float32",
        kernels=weaker if is_weaker else best,
        max_num_batched_tokens=512,
        kv_cache_bytes=64 * 2**20,
    )
    assert ("portable" if weaker == "portable" else "torch") in engine.computed_by, engine.computed_by
    prompt = (oracle.prompts[0] * LONG)[:LONG]
    run = driver.serve(world, engine, [driver.request(0, prompt, 4), driver.request(1, oracle.prompts[1], 8)])
    if world.at.rank == 0:
        assert run.tokens[1] == oracle.tokens[1][:8]
