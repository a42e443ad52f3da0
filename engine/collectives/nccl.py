"""Tensor traffic of CUDA worlds over NCCL, through torch.distributed; plans and tokens still travel over MPI.

Called by `join_world`. One GPU a rank: the rank's number on its host is its device.
"""

from __future__ import annotations

import socket

import numpy as np
import torch
import torch.distributed as dist
from mpi4py import MPI

from engine.collectives.base import Link, TensorGroup
from engine.collectives.mpi import SingleRankGroup
from engine.world import Coordinates

_ADDRESS_BYTES = 256


def join_nccl(
    at: Coordinates, everyone: MPI.Intracomm, local_rank: int
) -> tuple[TensorGroup, Link | None, Link | None]:
    """The rank's tensor group and its links to the stages before and after. Every rank calls it once."""
    torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank)
    dist.init_process_group(
        "nccl", store=_meet(everyone), rank=at.rank, world_size=at.tp * at.pp, device_id=device
    )
    # Every rank must make every group, in the same order.
    groups = [dist.new_group(list(range(stage * at.tp, (stage + 1) * at.tp))) for stage in range(at.pp)]
    group = NcclTensorGroup(groups[at.pp_rank], at) if at.tp > 1 else SingleRankGroup()
    previous_stage = None if at.is_first_stage else NcclLink(at.rank - at.tp)
    next_stage = None if at.is_last_stage else NcclLink(at.rank + at.tp)
    return group, previous_stage, next_stage


class NcclTensorGroup:
    """See `base.TensorGroup`. Sums in float32, as on CPU worlds."""

    def __init__(self, group: dist.ProcessGroup, at: Coordinates) -> None:
        self.size = at.tp
        self._group = group
        self._is_first = at.tp_rank == 0

    def add_reduced(self, total: torch.Tensor, partial: torch.Tensor) -> None:
        total.add_(self.reduced(partial))

    def reduced(self, partial: torch.Tensor) -> torch.Tensor:
        partial = partial.float()
        dist.all_reduce(partial, group=self._group)
        return partial

    def shared_sums(self, count: int) -> None:
        return None

    def sum_in_rank_order(self) -> None:
        raise NotImplementedError("deterministic worlds run on CPUs")

    def gather(self, local: torch.Tensor, widths: list[int]) -> torch.Tensor | None:
        # NCCL gathers equal shapes only; shares of the vocabulary differ by a few columns.
        padded = torch.nn.functional.pad(local, (0, max(widths) - local.shape[1]))
        parts = [torch.empty_like(padded) for _ in widths]
        dist.all_gather(parts, padded, group=self._group)
        if not self._is_first:
            return None
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def end_step(self) -> None:
        # A barrier would cost a launch and a wait on the device; sums of another step are not noticed here.
        return None


class NcclLink:
    """See `base.Link`. Sends are queued on the device's stream, so they never block this rank. NCCL has no tags: the
    step is not looked at."""

    def __init__(self, peer: int) -> None:
        self._peer = peer

    def send(self, hidden: torch.Tensor, step: int) -> None:
        dist.send(hidden, dst=self._peer)

    def receive(self, hidden: torch.Tensor, step: int) -> None:
        dist.recv(hidden, src=self._peer)


def _meet(everyone: MPI.Intracomm) -> dist.TCPStore:
    """A store at rank 0 on a free port, whose address the others learn over MPI."""
    address = np.zeros(_ADDRESS_BYTES, dtype=np.uint8)
    size, is_master = everyone.Get_size(), everyone.Get_rank() == 0
    if is_master:
        host = socket.getfqdn() if size > 1 else "127.0.0.1"
        store = dist.TCPStore(host, 0, size, is_master=True, wait_for_workers=False)
        text = f"{host} {store.port}".encode()
        address[: len(text)] = np.frombuffer(text, dtype=np.uint8)
    everyone.Bcast(address, root=0)
    if is_master:
        return store
    host, port = address.tobytes().rstrip(b"\0").decode().split()
    return dist.TCPStore(host, int(port), size, is_master=False)
