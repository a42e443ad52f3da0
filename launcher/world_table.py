"""What the front and `/cluster` are told of the worlds: the world table, and when it is sent. Called by the
supervisor; it reads the worlds and changes nothing."""

from __future__ import annotations

from collections.abc import Container, Sequence

from gateway.control_messages import HostEntry, RankEntry, WorldEntry, WorldTable
from launcher.fault_log import FaultLog
from launcher.fronts import Fronts
from launcher.hosts import HostPool
from launcher.world_records import RankWatch, WorldPlan, WorldState
from launcher.worlds import World

TABLE_INTERVAL_S = 0.25


class TableTeller:
    """Sends the table to the front when something has changed, and now and then."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._sent_at = 0.0

    def tell(
        self,
        fronts: Fronts,
        epoch: int,
        worlds: Sequence[World],
        faults: FaultLog,
        notice: str | None,
        plan: WorldPlan,
        pool: HostPool,
        now: float,
    ) -> None:
        """`worlds` in the order of the table; `plan`: what was asked for."""
        claim = fronts.claim
        key = (
            epoch,
            claim,
            fronts.identities,
            faults.version,
            notice is None,
            *pool.lost,
            *((world.epoch, world.state, world.is_spare, len(world.ranks)) for world in worlds),
        )
        if key == self._key and now - self._sent_at < TABLE_INTERVAL_S:
            return
        self._key = key
        self._sent_at = now
        entries = [world_entry(world, now) for world in worlds]
        used = {host.name for world in worlds if world.state is WorldState.ACTIVE for host in world.hosts}
        hosts = host_entries(pool, used, now)
        fronts.send(WorldTable(epoch, entries, faults.records, notice, claim, plan.tp, plan.pp, hosts))


def host_entries(pool: HostPool, used: Container[str], now: float) -> list[HostEntry]:
    """The hosts of `--hosts` as the front and `/cluster` see them; `used` by a world that is active."""
    entries = []
    for host in pool.hosts:
        loss = pool.lost.get(host.name)
        since, reason = (loss.unix_at, loss.reason) if loss is not None else (None, None)
        state = pool.state_of(host, host.name in used, now)
        entries.append(HostEntry(host.name, host.slots, state, since, reason))
    return entries


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
