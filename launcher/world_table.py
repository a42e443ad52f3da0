"""What the front and `/cluster` are told of a world: its entry in the world table. Called by the supervisor; it
reads the world and changes nothing."""

from __future__ import annotations

from gateway.control_messages import RankEntry, WorldEntry
from launcher.world_records import RankWatch, WorldState
from launcher.worlds import World


def world_entry(world: World, now: float) -> WorldEntry:
    """A world as the front and `/cluster` see it."""
    if world.state in (WorldState.DYING, WorldState.ACTIVE):
        state = world.state.value
    else:  # loading is a part of starting to those who wait for it
        state = "spare" if world.is_spare else "starting"
    return WorldEntry(
        epoch=world.epoch,
        state=state,
        model=world.plan.served_model_name,
        version=world.plan.version,
        replica=0,
        tp=world.plan.tp,
        pp=world.plan.pp,
        gateway=world.gateway if world.state is WorldState.ACTIVE else None,
        spare=world.spare.value if world.is_spare else None,
        ranks=[_rank_entry(world.plan.tp, rank, watch, now) for rank, watch in sorted(world.ranks.items())],
    )


def _rank_entry(tp_size: int, rank: int, watch: RankWatch, now: float) -> RankEntry:
    return RankEntry(
        rank=rank,
        tp=rank % tp_size,
        pp=rank // tp_size,
        host=watch.hello.host,
        pid=watch.hello.pid,
        guard_pid=watch.hello.guard_pid,
        state=watch.phase.name.lower(),
        step=watch.beat.step if watch.beat is not None else 0,
        heartbeat_age_s=max(0.0, now - watch.last_beat_at),
        memory_bytes=watch.beat.memory_bytes if watch.beat is not None else 0,
    )
