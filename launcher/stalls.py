"""When a world on its way is not waited for any longer. Used by `worlds`; it judges what it is given, and ends
nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from launcher.post_mortem import last_lines
from launcher.watch import Phase
from launcher.world_records import RankWatch, WorldFault

JOIN_TIMEOUT_S = 60.0
"""How long the guards of a world may take to report after mpirun was started."""
STARTUP_STALL_S = 300.0
"""How long no rank of a starting world may write to its progress page. Importing writes nothing while it runs, so
this is long."""
MEETING_STALL_S = 60.0
"""The same once all ranks are there and join MPI, which takes them a second, on large clusters some."""
ADOPTION_TIMEOUT_S = 10.0
"""How long the guards of an adopted world may take to report to the new supervisor."""


def find_stall(
    ranks: Mapping[int, RankWatch], size: int, waited_s: float, is_adopted: bool, mpirun_log: Path
) -> WorldFault | None:
    """Why a world is not waited for any longer that was started, promoted or found `waited_s` ago. `ranks`: those of
    its `size` ranks whose guards have reported."""
    if is_adopted and waited_s > ADOPTION_TIMEOUT_S:
        detail = f"the world was not found whole within {ADOPTION_TIMEOUT_S:.0f} s after its supervisor ended"
        return WorldFault("lost", None, None, detail, last_lines=last_lines(mpirun_log))
    if len(ranks) < size and waited_s > JOIN_TIMEOUT_S:
        missing = [str(rank) for rank in range(size) if rank not in ranks]
        detail = f"rank {', '.join(missing)} did not report within {JOIN_TIMEOUT_S:.0f} s"
        return WorldFault("start", None, None, detail, last_lines=last_lines(mpirun_log))
    ages = [watch.beat.age_s for watch in ranks.values() if watch.beat is not None]
    all_join = len(ranks) == size and all(watch.phase is Phase.JOINING for watch in ranks.values())
    limit_s = MEETING_STALL_S if all_join else STARTUP_STALL_S
    if waited_s > limit_s and ages and min(ages) > limit_s:
        phases = ", ".join(f"{rank} {watch.phase.name.lower()}" for rank, watch in ranks.items())
        detail = f"no rank made progress for {min(ages):.0f} s (rank {phases})"
        return WorldFault("start", None, None, detail, min(ages))
    return None
