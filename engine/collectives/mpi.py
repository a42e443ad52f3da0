"""The world's traffic over MPI: plans and tokens always, tensors on CPU worlds.

Called by `engine.rank` through `join_world`. Nothing here is pickled: every message is a buffer.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from mpi4py import MPI

from engine.collectives.shared_memory import CAPACITY, SharedMemorySums
from engine.world import Coordinates, World

PLAN_HEAD_INTS = 256
"""A broadcast carries this many int32 (1 KiB, 3.3 us between two ranks); a longer plan continues in a second
one of exactly the rest. A steady step of 64 sequences fits into the head."""

_GATHERED_ELEMENTS = 2**18
"""Up to this many elements of all ranks together (1 MiB), one collective that moves all of them to all takes less
time than two that move shares."""

_Found = TypeVar("_Found")

_SPIN_S = 0.002
_SLEEP_MIN_S, _SLEEP_MAX_S = 20e-6, 1.5e-3


_NUM_TAGS = 32768
"""The MPI standard promises so many."""


class WorldShapeError(Exception):
    """mpirun started another number of ranks than tp * pp."""


def _no_sign() -> None:
    return None


def library_version() -> str:
    """The MPI that is loaded, in short, like `Open MPI v5.0.11`. May be called before MPI_Init."""
    words = MPI.Get_library_version().rstrip("\0").split(",")[0].splitlines()
    return " ".join(words[0].split()) if words else ""


def join_world(
    tp: int,
    pp: int,
    cuda: bool = False,
    on_collective: Callable[[], None] = _no_sign,
    progress_words: tuple[int, int] | None = None,
) -> World:
    """Joins the MPI job that this process was started in. Every rank calls it once. `on_collective` is called
    before each transfer of tensors, as a sign of progress; where native code begins them it counts them itself, in
    `progress_words`: see SharedSum.show_progress_at.

    Raises WorldShapeError, on every rank, if the job does not have `tp * pp` ranks.
    """
    if not MPI.Is_initialized():
        MPI.Init_thread()
    everyone = MPI.COMM_WORLD
    if everyone.Get_size() != tp * pp:
        raise WorldShapeError(
            f"--tp {tp} --pp {pp} needs {tp * pp} ranks, but MPI started {everyone.Get_size()}; "
            f"start it with `mpirun -np {tp * pp}`"
        )
    at = Coordinates(everyone.Get_rank(), tp, pp)
    host = everyone.Split_type(MPI.COMM_TYPE_SHARED)
    group = everyone.Split(color=at.pp_rank, key=at.tp_rank)
    pipeline = everyone.Split(color=at.tp_rank, key=at.pp_rank)
    control = MpiControl(everyone)
    if cuda:
        from engine.collectives.nccl import join_nccl

        tensor_group, previous_stage, next_stage = join_nccl(at, everyone, host.Get_rank())
    else:
        tensor_group = MpiTensorGroup(group, on_collective, progress_words) if tp > 1 else SingleRankGroup()
        previous_stage = None if at.is_first_stage else MpiLink(pipeline, at.pp_rank - 1, on_collective)
        next_stage = None if at.is_last_stage else MpiLink(pipeline, at.pp_rank + 1, on_collective)
    return World(
        at=at,
        local_rank=host.Get_rank(),
        local_size=host.Get_size(),
        control=control,
        tensor_group=tensor_group,
        previous_stage=previous_stage,
        next_stage=next_stage,
    )


class SingleRankGroup:
    """Tensor parallelism of one: nothing to reduce, nothing to gather."""

    size = 1

    def add_reduced(self, total: torch.Tensor, partial: torch.Tensor) -> None:
        total.add_(partial)

    def reduced(self, partial: torch.Tensor) -> torch.Tensor:
        return partial.float()

    def shared_sums(self, count: int) -> None:
        return None

    def sum_in_rank_order(self) -> None:
        return

    def gather(self, local: torch.Tensor, widths: list[int]) -> torch.Tensor | None:
        return local

    def end_step(self) -> None:
        return None


class MpiTensorGroup:
    """Sums in float32 whatever the model's type: MPI has no bfloat16, and partial sums deserve the bits."""

    def __init__(
        self, comm: MPI.Comm, on_collective: Callable[[], None], progress_words: tuple[int, int] | None
    ) -> None:
        self._comm = comm
        self._on_collective = on_collective
        self._ends = comm.Dup()
        """Only ends of steps meet here, never reductions."""
        self.size = comm.Get_size()
        self._rank = comm.Get_rank()
        self._in_rank_order = False
        self._shared = SharedMemorySums.join(comm)
        if self._shared is not None and progress_words is not None:
            self._shared.show_progress_at(*progress_words)

    def add_reduced(self, total: torch.Tensor, partial: torch.Tensor) -> None:
        total.add_(self.reduced(partial))

    def reduced(self, partial: torch.Tensor) -> torch.Tensor:
        self._on_collective()
        partial = partial.float()
        if self._shared is not None:
            partial = partial.contiguous()
            self._shared.sum(partial)
            return partial
        if self._in_rank_order:
            return self._summed_in_rank_order(partial)
        self._comm.Allreduce(MPI.IN_PLACE, partial.numpy(), MPI.SUM)
        return partial

    def shared_sums(self, count: int) -> SharedMemorySums | None:
        return self._shared if count <= CAPACITY else None

    def sum_in_rank_order(self) -> None:
        # MPI picks an algorithm by size, and with it an order. Two addends commute, bit for bit.
        self._in_rank_order = self.size > 2

    def _summed_in_rank_order(self, partial: torch.Tensor) -> torch.Tensor:
        count = partial.numel()
        if count * self.size <= _GATHERED_ELEMENTS:
            everything = torch.empty(self.size, count)
            self._comm.Allgather(partial.contiguous().numpy(), everything.numpy())
            return _sum_of_rows(everything).view(partial.shape)
        # Each rank sums one share of the elements and hands it to the others: what a ring would move, too.
        share = -(-count // self.size)
        mine = torch.zeros(self.size, share)
        mine.view(-1)[:count] = partial.reshape(-1)
        parts = torch.empty(self.size, share)
        self._comm.Alltoall(mine.numpy(), parts.numpy())
        self._comm.Allgather(_sum_of_rows(parts).numpy(), mine.numpy())
        return mine.view(-1)[:count].view(partial.shape)

    def gather(self, local: torch.Tensor, widths: list[int]) -> torch.Tensor | None:
        self._on_collective()
        num_rows = local.shape[0]
        sent = local.contiguous().numpy()
        if self._rank != 0:
            self._comm.Gatherv(sent, None, root=0)
            return None
        counts = [num_rows * width for width in widths]
        received = np.empty(sum(counts), dtype=np.float32)
        self._comm.Gatherv(sent, (received, counts), root=0)
        parts = torch.from_numpy(received).split(counts)
        return torch.cat([part.view(num_rows, -1) for part in parts], dim=1)

    def end_step(self) -> None:
        self._ends.Barrier()


def _sum_of_rows(parts: torch.Tensor) -> torch.Tensor:
    """From the first to the last, in place of the first."""
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


class MpiLink:
    """Activations between neighbouring stages. A message in flight keeps its buffer alive here."""

    def __init__(self, comm: MPI.Comm, peer: int, on_collective: Callable[[], None]) -> None:
        self._comm = comm
        self._on_collective = on_collective
        self._peer = peer
        self._in_flight: deque[tuple[MPI.Request, torch.Tensor]] = deque()

    def send(self, hidden: torch.Tensor, step: int) -> None:
        self._on_collective()
        while self._in_flight and self._in_flight[0][0].Test():
            self._in_flight.popleft()
        request = self._comm.Isend(hidden.numpy(), dest=self._peer, tag=step % _NUM_TAGS)
        self._in_flight.append((request, hidden))

    def receive(self, hidden: torch.Tensor, step: int) -> None:
        self._on_collective()
        self._comm.Recv(hidden.numpy(), source=self._peer, tag=step % _NUM_TAGS)


class MpiControl:
    """Plans from rank 0 to all, results from the sampler to rank 0, each on a communicator of its own."""

    def __init__(self, comm: MPI.Comm) -> None:
        self._plans = comm.Dup()
        self._results = comm.Dup()
        self._status = MPI.Status()
        self._sent_results: deque[tuple[MPI.Request, bytes]] = deque()
        self._outstanding: deque[tuple[MPI.Request, np.ndarray]] = deque()
        # More ranks than cores: a rank that waits gives its core to one that works.
        self._crowded = comm.Get_size() > len(os.sched_getaffinity(0))

    def broadcast_plan(self, plan: np.ndarray) -> None:
        if self._plans.Get_size() == 1:
            return
        while self._outstanding and self._outstanding[0][0].Test():
            self._outstanding.popleft()
        # The plan's first int is its length, so that receivers know whether there is a continuation.
        head = np.zeros(PLAN_HEAD_INTS, dtype=np.int32)
        head[: min(len(plan), PLAN_HEAD_INTS)] = plan[:PLAN_HEAD_INTS]
        self._outstanding.append((self._plans.Ibcast(head, root=0), head))
        if len(plan) > PLAN_HEAD_INTS:
            rest = plan[PLAN_HEAD_INTS:]
            self._outstanding.append((self._plans.Ibcast(rest, root=0), rest))

    def receive_plan(self) -> np.ndarray:
        head = np.empty(PLAN_HEAD_INTS, dtype=np.int32)
        self._wait(self._plans.Ibcast(head, root=0).Test)
        length = int(head[0])
        if length <= PLAN_HEAD_INTS:
            return head[:length]
        plan = np.empty(length, dtype=np.int32)
        plan[:PLAN_HEAD_INTS] = head
        self._wait(self._plans.Ibcast(plan[PLAN_HEAD_INTS:], root=0).Test)
        return plan

    def send_result(self, slot: int, result: bytes) -> None:
        while self._sent_results and self._sent_results[0][0].Test():
            self._sent_results.popleft()
        self._sent_results.append((self._results.Isend([result, MPI.BYTE], dest=0, tag=slot), result))

    def receive_result(self, slot: int) -> bytes:
        # The sampler is the only rank that sends on this communicator; the size is in the message.
        message = self._wait(
            lambda: self._results.Improbe(source=MPI.ANY_SOURCE, tag=slot, status=self._status)
        )
        result = bytearray(self._status.Get_count(MPI.BYTE))
        message.Recv([result, MPI.BYTE])
        return bytes(result)

    def agree_min(self, value: int) -> int:
        smallest = np.array([value], dtype=np.int64)
        self._plans.Allreduce(MPI.IN_PLACE, smallest, MPI.MIN)
        return int(smallest[0])

    def barrier(self) -> None:
        self._plans.Barrier()

    def close(self) -> None:
        self._plans.Barrier()
        MPI.Finalize()

    def _wait(self, arrived: Callable[[], _Found | None]) -> _Found:
        """Asks without pause for the length of a short gap between steps, then with growing naps: a world at
        rest costs next to nothing, and wakes within two milliseconds."""
        asleep_from = time.perf_counter() + _SPIN_S
        nap_s = _SLEEP_MIN_S
        while True:
            found = arrived()
            if found:
                return found
            if time.perf_counter() < asleep_from:
                if self._crowded:
                    os.sched_yield()
            else:
                time.sleep(nap_s)
                nap_s = min(nap_s * 1.5, _SLEEP_MAX_S)
