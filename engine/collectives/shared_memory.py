"""Sums over the ranks of one host through memory that they share, in place of MPI's.

Called by `mpi.MpiTensorGroup` where all its ranks stand on one host. The memory has no name: nothing of it is left
when the ranks are gone, however they end. A wait for a peer that is lost ends as with MPI: guards end all ranks.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
from mpi4py import MPI

from engine.kernels.bindings import SharedSum
from engine.kernels.library import KernelsUnavailable

CAPACITY = 2**22
"""Elements of a buffer. Of these 16 MiB only what sums have needed is ever touched, and so there. Longer sums go in
pieces."""

_SPIN_S = 0.02
_NAP_S = 2e-4
_PATH_BYTES = 64


class SharedMemorySums:
    """What the ranks of a communicator add up."""

    def __init__(self, comm: MPI.Comm, memory: mmap.mmap, crowded: bool) -> None:
        self._comm = comm
        self._memory = memory
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        self._sums = SharedSum(address, comm.Get_rank(), comm.Get_size(), CAPACITY, crowded)
        self._waiting_since = 0.0

    @classmethod
    def join(cls, comm: MPI.Comm) -> SharedMemorySums | None:
        """Of all ranks of `comm`, each of which calls it; None, on every rank, where one of them cannot: ranks on
        several hosts, or in containers that do not see each other's files, or without native kernels."""
        host = comm.Split_type(MPI.COMM_TYPE_SHARED)
        on_one_host = host.Get_size() == comm.Get_size()
        host.Free()
        if not _all_agree(comm, on_one_host):
            return None
        size = comm.Get_size() * SharedSum.segment_bytes(CAPACITY)
        first = comm.Get_rank() == 0
        memory = _make(size) if first else None
        path = np.zeros(_PATH_BYTES, dtype=np.uint8)
        if first and memory is not None:
            text = f"/proc/{os.getpid()}/fd/{memory}".encode()
            path[: len(text)] = np.frombuffer(text, dtype=np.uint8)
        token = np.frombuffer(os.urandom(8), dtype=np.uint8).copy()
        comm.Bcast(path, root=0)
        comm.Bcast(token, root=0)
        mapped = _map(path.tobytes().rstrip(b"\0").decode(), size)
        if first and mapped is not None:
            mapped[:8] = token.tobytes()
        comm.Barrier()
        # Where /proc is another machine's or another container's, such a path may be something else.
        found = mapped is not None and mapped[:8] == token.tobytes()
        agreed = _all_agree(comm, found)
        if first and mapped is not None:
            mapped[:8] = bytes(8)
        comm.Barrier()
        if memory is not None:
            os.close(memory)
        if not agreed or mapped is None:
            return None
        sums = None
        with suppress(KernelsUnavailable):
            sums = cls(comm, mapped, comm.Get_size() > len(os.sched_getaffinity(0)))
        return sums if _all_agree(comm, sums is not None) else None

    @property
    def waited_s(self) -> float:
        """See SharedSum."""
        return self._sums.waited_s

    def show_progress_at(self, begun: int, begun_at_ns: int) -> None:
        """See SharedSum."""
        self._sums.show_progress_at(begun, begun_at_ns)

    def drive(self, work: Callable[[SharedSum], bool]) -> None:
        """Calls native work that sums by itself until it is done: it comes back early where ranks keep it waiting."""
        self._waiting_since = 0.0
        while not work(self._sums):
            self._meanwhile()

    def sum(self, data: torch.Tensor) -> None:
        """Replaces contiguous float32 `data` by the sum over the ranks, in their order."""
        self._waiting_since = 0.0
        self._sums.sum(data, self._meanwhile)

    def _meanwhile(self) -> None:
        # MPI moves long messages only while it is called, and a peer may wait for one of them.
        self._comm.Iprobe()
        now = time.monotonic()
        if not self._waiting_since:
            self._waiting_since = now
        if now > self._waiting_since + _SPIN_S:
            time.sleep(_NAP_S)
        else:
            os.sched_yield()  # whoever is waited for may have lost its core to this one


def _all_agree(comm: MPI.Comm, yes: bool) -> bool:
    answer = np.array([yes], dtype=np.int32)
    comm.Allreduce(MPI.IN_PLACE, answer, MPI.MIN)
    return bool(answer[0])


def _make(size: int) -> int | None:
    """A file descriptor of zeros without a name."""
    try:
        memory = os.memfd_create("phalanx-sums")
    except (AttributeError, OSError):
        return None
    try:
        os.ftruncate(memory, size)
    except OSError:
        os.close(memory)
        return None
    return memory


def _map(path: str, size: int) -> mmap.mmap | None:
    if not path:
        return None
    try:
        memory = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return mmap.mmap(memory, size) if os.fstat(memory).st_size == size else None
    except (OSError, ValueError):
        return None
    finally:
        os.close(memory)
