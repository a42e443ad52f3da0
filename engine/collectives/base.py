"""Interfaces of the traffic inside a world. Models and the step loop see these, never MPI or NCCL.

Waiting: every method waits as long as it takes, since a peer that dies takes the whole world with it: the
guards see a death within milliseconds and kill every rank, so no wait here outlives the world.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from engine.kernels.bindings import SharedSum


class SharedSums(Protocol):
    """Sums that native code takes, on ranks that share memory."""

    def drive(self, work: Callable[[SharedSum], bool]) -> None:
        """Calls `work` until it says that it is done, and does in between what a rank that waits has to do."""
        ...


class TensorGroup(Protocol):
    """The tensor-parallel ranks of one stage."""

    size: int

    def add_reduced(self, total: torch.Tensor, partial: torch.Tensor) -> None:
        """`total += sum of partial over the ranks`. `total` is float32 and the same on every rank before and
        after; `partial` has its shape, in any float type, and may be overwritten."""
        ...

    def reduced(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of `partial` over the ranks, float32 and the same on every rank. `partial`, in any float type
        and the same shape everywhere, may be overwritten, and the result may be its memory."""
        ...

    def shared_sums(self, count: int) -> SharedSums | None:
        """What native code may use to take sums of `count` elements by itself, with the bits that `reduced` gives;
        the other ranks may call `reduced`. None: there is no such way."""
        ...

    def sum_in_rank_order(self) -> None:
        """From now on sums are taken in the order of the ranks: an element's bits depend neither on the size of
        what is reduced nor on where in it the element stands. Every rank calls it."""
        ...

    def gather(self, local: torch.Tensor, widths: list[int]) -> torch.Tensor | None:
        """Columns of all ranks side by side, float32, at the group's first rank; None at the others.

        `local` is `[num_rows, widths[tp_rank]]` float32; the result `[num_rows, sum(widths)]`."""
        ...

    def end_step(self) -> None:
        """Waits until every rank of the group has come to the end of the step.

        Reductions carry no number: a rank that left one out would meet the others' last one with the first of its
        next step, and wrong sums would go on unseen. Here it waits for ever instead, which its guard sees. Needed
        only where a rank can go on to another step before this one's tokens are drawn: with several stages."""
        ...


class Link(Protocol):
    """One direction of the pipeline, between two ranks of the same tp_rank."""

    def send(self, hidden: torch.Tensor, step: int) -> None:
        """Hands on `[num_tokens, hidden_size]` float32 of this step; returns before it has arrived."""
        ...

    def receive(self, hidden: torch.Tensor, step: int) -> None:
        """Fills `hidden` `[num_tokens, hidden_size]` float32. Takes those of this step only: if they were never
        sent, it waits rather than computing with those of another one."""
        ...


class Control(Protocol):
    """Small messages between rank 0 and the others, on communicators of their own."""

    def broadcast_plan(self, plan: np.ndarray) -> None:
        """Rank 0: sends a plan (int32) to every rank, without waiting for them."""
        ...

    def receive_plan(self) -> np.ndarray:
        """Other ranks: the next plan. Busy at first, then asleep for up to 1.5 ms at a time."""
        ...

    def send_result(self, slot: int, result: bytes) -> None:
        """Sampler: what this slot's plan brought, to rank 0. Sent for every plan."""
        ...

    def receive_result(self, slot: int) -> bytes:
        """Rank 0: what this slot's plan brought."""
        ...

    def agree_min(self, value: int) -> int:
        """The smallest value that any rank gave. Every rank calls it."""
        ...

    def barrier(self) -> None: ...

    def close(self) -> None:
        """Ends the world's traffic in order (MPI_Finalize). Every rank calls it."""
        ...
