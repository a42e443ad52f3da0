"""Sums through shared memory: every rank gets the same bits, those of a sum in the order of the ranks."""

from __future__ import annotations

import mmap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine.kernels.bindings import SharedSum
from tests.native_kernels import instruction_sets

CAPACITY = 8192  # above what more than two ranks share out
instruction_sets()


def _ranks(size: int, crowded: bool = False) -> tuple[list[SharedSum], mmap.mmap]:
    memory = mmap.mmap(-1, size * SharedSum.segment_bytes(CAPACITY))
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    return [SharedSum(address, rank, size, CAPACITY, crowded) for rank in range(size)], memory


@pytest.mark.parametrize(("size", "crowded"), [(2, False), (3, True), (4, True)])
def test_every_rank_gets_the_sum_in_rank_order(size: int, crowded: bool) -> None:
    ranks, _memory = _ranks(size, crowded)
    random = torch.Generator().manual_seed(size)
    # Short, in shares, in several pieces whose last is of any length; often enough for both buffers to be used again.
    counts = [1, 577, 1, CAPACITY, 2 * CAPACITY + 4099, 16, 3 * CAPACITY, 577] * 2
    parts = [[torch.randn(count, generator=random) for _ in ranks] for count in counts]
    expected = []
    for of_ranks in parts:
        total = of_ranks[0].clone()
        for part in of_ranks[1:]:
            total += part
        expected.append(total)

    def run(rank: int) -> None:
        for of_ranks in parts:
            ranks[rank].sum(of_ranks[rank], lambda: None)

    with ThreadPoolExecutor(size) as pool:
        list(pool.map(run, range(size)))
    for of_ranks, total in zip(parts, expected, strict=True):
        assert all(torch.equal(part, total) for part in of_ranks)


def test_a_rank_that_waits_is_asked_what_else_there_is_to_do() -> None:
    ranks, _memory = _ranks(2)
    first, second, asked = torch.ones(5), torch.full((5,), 2.0), threading.Event()
    waiting = threading.Thread(target=lambda: ranks[0].sum(first, asked.set))
    waiting.start()
    assert asked.wait(30)
    assert waiting.is_alive() and torch.equal(first, torch.ones(5))
    ranks[1].sum(second, lambda: None)
    waiting.join(30)
    assert torch.equal(first, torch.full((5,), 3.0)) and torch.equal(second, first)
