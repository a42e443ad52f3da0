"""A stage that takes its sums over the ranks by itself: the bits are those of parts with the sums between."""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from engine.kernels.bindings import SharedSum
from engine.models.families import QueryKeyNorm
from tests.native_kernels import instruction_sets
from tests.unit.test_kernels_stage import CONFIGS, Served

CAPACITY = 400 * 70
PATH = instruction_sets()[0]
NUM_STEPS = 5


class _Group:
    """A rank of some in this process."""

    def __init__(self, sums: SharedSum, size: int, sums_natively: bool) -> None:
        self.size = size
        self.words = np.zeros(2, dtype=np.int64)
        self.waited = threading.Event()
        self._sums, self._sums_natively = sums, sums_natively
        sums.show_progress_at(self.words.ctypes.data, self.words.ctypes.data + 8)

    def shared_sums(self, count: int) -> _Group | None:
        return self if self._sums_natively and count <= CAPACITY else None

    def drive(self, work: Callable[[SharedSum], bool]) -> None:
        while not work(self._sums):
            self.waited.set()

    def reduced(self, partial: torch.Tensor) -> torch.Tensor:
        self._sums.sum(partial, self.waited.set)
        return partial

    def add_reduced(self, total: torch.Tensor, partial: torch.Tensor) -> None:
        raise NotImplementedError

    def sum_in_rank_order(self) -> None:
        return None

    def gather(self, local: torch.Tensor, widths: list[int]) -> None:
        return None

    def end_step(self) -> None:
        return None


def _groups(natively: list[bool]) -> tuple[list[_Group], mmap.mmap]:
    size = len(natively)
    memory = mmap.mmap(-1, size * SharedSum.segment_bytes(CAPACITY))
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    ranks = [SharedSum(address, rank, size, CAPACITY, True) for rank in range(size)]
    return [_Group(sums, size, mode) for sums, mode in zip(ranks, natively, strict=True)], memory


def _results(
    name: str, natively: list[bool], in_pieces: bool = False
) -> list[dict[tuple[int, int], torch.Tensor]]:
    """Of each rank: what some steps bring, by (sequence, position). `in_pieces`: with a step of more rows than are
    computed at once."""
    groups, _memory = _groups(natively)
    size = len(groups)

    def run(rank: int) -> dict[tuple[int, int], torch.Tensor]:
        served = Served(
            CONFIGS[name], torch.bfloat16, PATH, threads=2, tp=size, rank=rank, group=groups[rank]
        )
        served.step(chunks=[(1, 90), (2, 3)])  # with three ranks, each sums a share
        if in_pieces:
            served.step(decode=[2], chunks=[(4, 200), (5, 130)])
        served.step(decode=[2], chunks=[(1, 40), (3, 17)])
        for _ in range(3):
            served.step(decode=[3, 1, 2])
        return served.results

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(run, range(size)))
    parts = 3 if CONFIGS[name].query_key_norm is QueryKeyNorm.PROJECTION else 2
    for group, native in zip(groups, natively, strict=True):
        assert group.words[0] == ((NUM_STEPS + in_pieces) * CONFIGS[name].num_layers * parts if native else 0)
    return results


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["plain", "odd", "experts", "after", "projections"])
def test_the_bits_are_those_of_part_after_part(name: str, size: int) -> None:
    for natively, in_pieces in (([True] * size, True), ([rank == 1 for rank in range(size)], False)):
        expected = _results(name, [False] * size, in_pieces)
        for rank, found in enumerate(_results(name, natively, in_pieces)):
            assert found.keys() == expected[rank].keys()
            for key, value in found.items():
                assert torch.equal(value, expected[rank][key]), (natively, rank, key)


def test_progress_is_shown_while_another_rank_is_waited_for() -> None:
    groups, _memory = _groups([True, True])
    served = [
        Served(CONFIGS["plain"], torch.bfloat16, PATH, tp=2, rank=rank, group=groups[rank]) for rank in (0, 1)
    ]
    before = time.monotonic_ns()
    waiting = threading.Thread(target=served[0].step, kwargs={"chunks": [(1, 3)]})
    waiting.start()
    assert groups[0].waited.wait(30)
    assert groups[0].words[0] == 1
    assert before <= groups[0].words[1] <= time.monotonic_ns()
    served[1].step(chunks=[(1, 3)])
    waiting.join(30)
    assert not waiting.is_alive()
    assert [group.words[0] for group in groups] == [4, 4]


def test_pieces_go_on_where_they_waited_for_another_rank() -> None:
    def results(natively: bool) -> list[dict[tuple[int, int], torch.Tensor]]:
        groups, _memory = _groups([natively] * 2)
        served = [
            Served(CONFIGS["plain"], torch.bfloat16, PATH, tp=2, rank=rank, group=groups[rank])
            for rank in (0, 1)
        ]
        with ThreadPoolExecutor(1) as pool:
            for first, second in ((0, 1), (1, 0)):
                groups[first].waited.clear()
                chunks = [(10 + first, 200), (20 + first, 100)]
                ahead = pool.submit(served[first].step, chunks=chunks)
                assert groups[first].waited.wait(30)
                served[second].step(chunks=chunks)
                ahead.result(30)
        return [each.results for each in served]

    for found, expected in zip(results(True), results(False), strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_words_of_a_page_can_be_written_natively(tmp_path: object) -> None:
    from launcher.watch import ProgressPage

    page = ProgressPage.open(None)
    page.step(5, 1)
    page.collective()
    begun, begun_at = page.collective_words()
    ctypes.c_int64.from_address(begun).value += 2
    ctypes.c_int64.from_address(begun_at).value = time.monotonic_ns() - 3 * 10**9
    progress = page.read()
    assert (progress.step, progress.collective) == (5, 3)
    assert 3.0 <= progress.age_s < 60.0
