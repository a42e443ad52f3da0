"""Small random models of every family on this shape of world against transformers."""

from __future__ import annotations

import numpy as np
import pytest

from engine.world import World
from tests import family_references
from tests.family_references import NUM_TOKENS, FamilyReference
from tests.tiny_models import TINY_FAMILIES
from tests.world import driver

pytestmark = pytest.mark.mpi

OLMO_2 = [name for name in TINY_FAMILIES if name.startswith("olmo2")]
"""Norms over whole projections: with several ranks, each has a part of what is normalised."""
SHAPES = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)]


@pytest.fixture(scope="module")
def references(world: World) -> dict[str, FamilyReference]:
    if (world.at.tp, world.at.pp) not in SHAPES:
        pytest.skip("the other shapes cut in ways that these have")
    return family_references.load()


def _serve(
    world: World, reference: FamilyReference, dtype: str, num_tokens: int, **settings: object
) -> driver.Run:
    # The first prompt comes in three chunks, the later ones beside the second prompt's decode rows.
    engine = driver.build(
        world,
        reference.folder,
        dtype=dtype,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        kv_cache_bytes=2**20,
        **settings,
    )
    assert "native kernels" in engine.computed_by
    requests = [driver.request(row, prompt, num_tokens) for row, prompt in enumerate(reference.prompts)]
    return driver.serve(world, engine, requests, record_logits=True)


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_greedy_tokens_and_logits(world: World, references: dict[str, FamilyReference], name: str) -> None:
    reference = references[name]
    _check(world, reference, _serve(world, reference, "float32", NUM_TOKENS))


@pytest.mark.parametrize("name", [name for name in TINY_FAMILIES if "mixtral" in name or "moe" in name])
def test_whole_experts_on_ranks(world: World, references: dict[str, FamilyReference], name: str) -> None:
    reference = references[name]
    run = _serve(world, reference, "float32", NUM_TOKENS, expert_parallel=True)
    _check(world, reference, run)


def _check(world: World, reference: FamilyReference, run: driver.Run) -> None:
    if world.at.is_sampler:
        for row, prompt in enumerate(reference.prompts):
            for index in range(NUM_TOKENS):
                error = np.abs(run.logits[row, len(prompt) + index] - reference.logits[row, index]).max()
                assert error < 1e-3, f"prompt {row}, token {index}: logits differ by {error}"
    if world.at.rank == 0:
        assert [run.tokens[row] for row in range(len(reference.prompts))] == reference.tokens


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_bfloat16_is_near(world: World, references: dict[str, FamilyReference], name: str) -> None:
    if (world.at.tp, world.at.pp) not in ((1, 1), (2, 2)):
        pytest.skip("types have nothing to do with shapes")
    reference = references[name]
    run = _serve(world, reference, "bfloat16", 1)
    if world.at.is_sampler:
        for row, prompt in enumerate(reference.prompts):
            # Only the first token: after another one, the rest is another text. A router near a tie may fall
            # the other way, which costs more than rounding.
            error = np.abs(run.logits[row, len(prompt)] - reference.logits[row, 0]).mean()
            assert error < 0.25 * reference.logits.std(), f"prompt {row}: logits differ by {error} on average"


@pytest.mark.parametrize("name", OLMO_2)
def test_norms_of_projections_have_the_same_bits_in_any_batch(
    world: World, references: dict[str, FamilyReference], name: str
) -> None:
    reference = references[name]
    engine = driver.build(
        world,
        reference.folder,
        dtype="bfloat16",
        deterministic=True,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        kv_cache_bytes=2**20,
    )
    rows = range(len(reference.prompts))
    together = driver.serve(
        world,
        engine,
        [driver.request(row, reference.prompts[row], NUM_TOKENS) for row in rows],
        record_logits=True,
    )
    for row in rows:
        request = driver.request(row, reference.prompts[row], NUM_TOKENS)
        alone = driver.serve(world, engine, [request], record_logits=True)
        if world.at.rank == 0:
            assert alone.tokens[row] == together.tokens[row]
        for key, logits in alone.logits.items():
            assert np.array_equal(logits, together.logits[key]), key


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_norms_of_projections_with_rounded_weights(
    world: World, references: dict[str, FamilyReference], quantization: str
) -> None:
    for name in OLMO_2:
        reference = references[name]
        run = _serve(world, reference, "bfloat16", 1, quantization=quantization)
        if world.at.is_sampler:
            most = {"int8": 0.1, "int4": 0.5}[quantization] * reference.logits.std()
            for row, prompt in enumerate(reference.prompts):
                error = np.abs(run.logits[row, len(prompt)] - reference.logits[row, 0]).mean()
                assert error < most, f"{name}, prompt {row}: logits differ by {error} on average"
