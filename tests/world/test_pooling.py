"""Pooled hidden states and token scores on this shape of world against transformers."""

from __future__ import annotations

import numpy as np
import pytest

from engine.engine import Engine
from engine.plan import Pooling, PoolingKind
from engine.scheduling.sequence import Sequence
from engine.world import World
from tests import pooling_references
from tests.pooling_references import PoolingReference
from tests.references import References
from tests.world import driver

pytestmark = pytest.mark.mpi

KINDS = [PoolingKind.LAST, PoolingKind.MEAN, PoolingKind.SCORE]


@pytest.fixture(scope="module")
def pooled() -> list[PoolingReference]:
    return pooling_references.load()


@pytest.fixture(scope="module")
def engine(world: World) -> Engine:
    # The long text comes in ten chunks and more.
    return driver.build(
        world, dtype="float32", max_num_seqs=8, max_num_batched_tokens=64, kv_cache_bytes=128 * 2**20
    )


def _ask(name: int, prompt: list[int], pooling: Pooling) -> Sequence:
    return driver.request(name, prompt, 0, pooling=pooling)


def _numbers(run: driver.Run) -> dict[int, np.ndarray]:
    """What each pooled request brought, by its name; each ends with its only output."""
    found: dict[int, np.ndarray] = {}
    for news in run.news:
        if news.pooled is not None:
            assert (news.token_id, news.finish_reason, news.position) == (None, "stop", 0)
            assert int(news.key[1]) not in found
            found[int(news.key[1])] = np.frombuffer(news.pooled, dtype="<f4")
    return found


def _check(numbers: np.ndarray, reference: PoolingReference, pooling: Pooling) -> None:
    if pooling.kind is PoolingKind.SCORE:
        expected = reference.scores[pooling.first_scored - 1 :]
    elif pooling.normalize:
        expected = reference.normalized(pooling.kind)
    else:
        expected = reference.last if pooling.kind is PoolingKind.LAST else reference.mean
    assert numbers.shape == expected.shape
    assert np.abs(numbers - expected).max() < 1e-3


def test_pooled_beside_streams_and_in_chunks(
    world: World, engine: Engine, oracle: References, pooled: list[PoolingReference]
) -> None:
    asked = {}
    for row, reference in enumerate([pooled[0], *pooled[-4:]]):
        for number, kind in enumerate(KINDS):
            # Scored from the first token possible, from the last, and from one in the middle of a block.
            first = [1, len(reference.prompt) - 1, len(reference.prompt) // 2][row % 3]
            asked[row * 10 + number] = (reference, Pooling(kind, row % 2 == 0, first))
    requests = [_ask(name, reference.prompt, pooling) for name, (reference, pooling) in asked.items()]
    streams = [driver.request(1000 + row, oracle.prompts[row], 24) for row in range(3)]
    run = driver.serve(world, engine, [*streams, *requests])
    if world.at.rank != 0:
        return
    numbers = _numbers(run)
    assert numbers.keys() == asked.keys()
    for name, (reference, pooling) in asked.items():
        _check(numbers[name], reference, pooling)
    for row in range(3):
        assert run.tokens[1000 + row] == oracle.tokens[row][:24], "a stream beside it must not notice"


def test_the_prefix_cache_changes_nothing(
    world: World, engine: Engine, oracle: References, pooled: list[PoolingReference]
) -> None:
    reference = pooled[0]
    end = len(reference.prompt)
    asks = [Pooling(kind, first_scored=first) for kind in KINDS for first in (64, 65, end - 1)]
    first = driver.request(99, reference.prompt, 1)
    # Behind it, one after another: all blocks of the prompt are in the cache by then.
    later = [_ask(name, reference.prompt, pooling) for name, pooling in enumerate(asks)]
    for sequence in later:
        sequence.priority = 1
    run = driver.serve(world, engine, [first, *later])
    if world.at.rank != 0:
        return
    numbers = _numbers(run)
    for name, pooling in enumerate(asks):
        _check(numbers[name], reference, pooling)
    # The last state: all full blocks, three times; scores: those before the first scored token; the mean: none.
    num_blocks = 3 * ((end - 1) // 16) + 63 // 16 + 64 // 16 + (end - 2) // 16
    if world.at.pp == 1:
        assert run.num_hit_tokens == num_blocks * 16
    else:  # some begin in another slot while the first is under way
        assert num_blocks * 8 < run.num_hit_tokens <= num_blocks * 16


def test_preempted_ones_begin_anew(world: World, oracle: References, pooled: list[PoolingReference]) -> None:
    # So small steps that the streams, which come first, outgrow the cache while a long prompt is computed.
    engine = driver.build(
        world, dtype="float32", max_num_seqs=4, max_num_batched_tokens=12, kv_cache_bytes=128 * 2**20
    )
    reference = pooled[-1]
    kinds = [Pooling(kind, first_scored=1) for kind in KINDS]
    streams = [driver.request(row, oracle.prompts[row], 60) for row in range(3)]
    asks = [_ask(10 + number, reference.prompt, pooling) for number, pooling in enumerate(kinds)]
    num_blocks = -(-len(reference.prompt) // 16) + 10
    run = driver.serve(world, engine, [*streams, *asks], kv_blocks=num_blocks)
    if world.at.rank == 0:
        # With stages, a long prompt has a slot, and its steps, of its own, and is done before the streams have grown.
        assert run.num_preemptions > 0 or world.at.pp > 1
        numbers = _numbers(run)
        for number, pooling in enumerate(kinds):
            _check(numbers[10 + number], reference, pooling)
        for row in range(3):
            assert run.tokens[row] == oracle.tokens[row][:60]


def test_cancelled_halfway_leaves_nothing(
    world: World, engine: Engine, oracle: References, pooled: list[PoolingReference]
) -> None:
    asks = [
        _ask(number, pooled[0].prompt, Pooling(kind, first_scored=1)) for number, kind in enumerate(KINDS)
    ]
    stream = driver.request(5, oracle.prompts[5], 30)
    run = driver.serve(world, engine, [stream, *asks], cancel_after={1: 0})
    if world.at.rank == 0:
        assert run.ends == {0: "stop", 1: "cancelled", 2: "stop", 5: "length"}
        assert run.tokens[5] == oracle.tokens[5][:30]
