"""The world's shape: which rank stands where, and the links it was given.

Made once by `engine.collectives.mpi.join_world`, then passed as an argument. It holds no model and no request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.collectives.base import Control, Link, TensorGroup


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands: `rank = pp_rank * tp + tp_rank`."""

    rank: int
    tp: int
    pp: int

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def pp_rank(self) -> int:
        return self.rank // self.tp

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def is_sampler(self) -> bool:
        """The first tensor-parallel rank of the last stage gathers the logits and draws the tokens."""
        return self.is_last_stage and self.tp_rank == 0


@dataclass(frozen=True)
class World:
    """A rank's view of its world."""

    at: Coordinates
    local_rank: int
    local_size: int
    """Ranks of this world on this host: they share its cores and its memory."""
    control: Control
    """Plans, sampled tokens, and what the ranks agree on at start."""
    tensor_group: TensorGroup
    """The ranks that hold the other shards of this rank's stage."""
    previous_stage: Link | None
    next_stage: Link | None
