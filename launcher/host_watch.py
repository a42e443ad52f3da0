"""Which hosts are lost and which are back: what faults say of them, and what probes find. Used by the supervisor; it
keeps the pool of hosts true, and must never block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from launcher.host_probes import HostProbes, by_commands
from launcher.hosts import HostPool, host_of
from launcher.logs import EventLog
from launcher.world_records import WorldFault, WorldPlan, WorldState
from launcher.worlds import World

LOST_FOR_S = 60.0
"""How long a host is lost where hosts cannot be asked."""
TELLS_OF_HOSTS = ("lost", "mpirun", "start")
"""Kinds of fault behind which a host may be that is dead."""


class HostWatch:
    """See the module's first lines."""

    def __init__(self, plan: WorldPlan, environment: dict[str, str], log: EventLog) -> None:
        self.pool = HostPool(plan.hosts, log, plan.launcher)
        self._probes: HostProbes | None = None
        """None where hosts cannot be asked."""
        if plan.wait_for_hosts_s is not None:
            probe = partial(self.pool.probe, environment)
            self._probes = HostProbes(by_commands(probe, environment))

    def ask_all(self, now: float) -> None:
        """Nobody knows who is lost."""
        if self._probes is not None:
            self._probes.ask(self.pool.others, now)

    def on_fault(self, world: World, fault: WorldFault, now: float) -> None:
        """A world has to die of it."""
        if fault.rank is not None:
            self.pool.on_fault(host_of(world.hosts, fault.rank), fault.kind, now)
        if fault.kind in TELLS_OF_HOSTS and self._probes is not None:
            self._probes.ask([host.name for host in world.hosts[1:]], now)

    def hear(
        self, worlds: Sequence[World], now: float, asks: bool = True
    ) -> tuple[bool, list[tuple[World, WorldFault]]]:
        """Whether a host is back, and which worlds will not come up, since one is not there. Unless it `asks`, those
        that are lost are asked by others now."""
        is_back, hopeless = False, []
        if self._probes is None:
            gone = [name for name, loss in self.pool.lost.items() if now - loss.at > LOST_FOR_S]
            for name in gone:
                self.pool.on_back(name, now)
            return bool(gone), []
        for answer in self._probes.poll(self.pool.lost if asks else (), now):
            if answer.reason is None:
                is_back |= answer.host in self.pool.lost
                self.pool.on_back(answer.host, now)
                continue
            self.pool.on_lost(answer.host, answer.reason, now)
            for world in worlds:
                is_starting = world.state is WorldState.STARTING and len(world.ranks) < world.size
                if is_starting and not world.is_adopted and self.has_lost_host(world, [answer.host]):
                    detail = f"host {answer.host}: {answer.reason}"
                    hopeless.append((world, WorldFault("start", None, answer.host, detail)))
        return is_back, hopeless

    def has_lost_host(self, world: World, lost: Iterable[str] | None = None) -> bool:
        """Whether a rank of the world is on one of these; by default on any that is lost."""
        names = self.pool.lost if lost is None else lost
        return any(host.name in names for host in world.hosts)

    def close(self) -> None:
        if self._probes is not None:
            self._probes.close()
