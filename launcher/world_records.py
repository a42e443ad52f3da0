"""What the supervisor writes down about a world: its plan, its state, its times, its ranks, its faults. Filled by
`launcher.worlds`; holds no behaviour beyond reading itself."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from launcher.guard_messages import Beat, GuardHello, RankFacts
from launcher.hangs import STARVED_AT_MOST_S
from launcher.hosts import Host
from launcher.launchers import Launcher, mpirun
from launcher.leases import FENCE_MARGIN, FENCE_MARGIN_S, LEASE_S, lease_s
from launcher.network import Interface
from launcher.processes import ProcessId, host_id
from launcher.starvation import StarvationOf
from launcher.watch import Phase


class WorldState(Enum):
    """STARTING: processes come up; LOADING: weights; PARKED: a spare whose ranks all wait for their turn;
    ACTIVE: its gateway listens and every rank is ready; DYING: being killed; DEAD: no process of it is left."""

    STARTING = "starting"
    LOADING = "loading"
    PARKED = "parked"
    ACTIVE = "active"
    DYING = "dying"
    DEAD = "dead"


@dataclass(frozen=True)
class Doing:
    """What a rank was doing, as far as is known."""

    phase: str | None = None
    step: int | None = None
    collective: int | None = None
    age_s: float | None = None
    """Seconds since it had last shown progress."""


def phase_of(number: int) -> Phase:
    """A phase of a later version of the rank counts as its neighbour."""
    return Phase(min(max(number, 0), max(Phase)))


@dataclass
class RankWatch:
    """What the supervisor knows of one rank."""

    hello: GuardHello
    identity: bytes
    last_beat_at: float
    beat: Beat | None = None
    acknowledged: bool = False
    facts: RankFacts | None = None
    """What the rank has told of itself, once it has."""
    clock_ahead_s: float | None = None
    """By how much the clock of its host was ahead when its guard reported, less the way of the message."""
    starvation: StarvationOf | None = None
    starved_s: float = 0.0
    """Of the guard's silence, what it or this process spent waiting for a processor."""
    lease_s: float = LEASE_S
    """Of a guard on another host, as it was given last."""
    leased_until: float = 0.0
    """When the longest of all its leases ends at the latest, with the margin; 0 before the first."""

    @property
    def phase(self) -> Phase:
        """From the last beat."""
        return phase_of(self.beat.phase) if self.beat is not None else Phase.STARTING

    @property
    def doing(self) -> Doing | None:
        """As its last beat said; None before the first."""
        beat = self.beat
        if beat is None:
            return None
        return Doing(self.phase.name.lower(), beat.step, beat.collective, beat.age_s)

    def hear(self, now: float) -> None:
        """The guard lives."""
        self.last_beat_at = now
        self.starvation, self.starved_s = None, 0.0

    def lease(self, delay_s: float) -> float:
        """Gives a lease to the guard, which has sent a beat before this call. Seconds from that beat on."""
        self.lease_s = lease_s(delay_s)
        ends_at = time.monotonic() + (1 + FENCE_MARGIN) * self.lease_s
        self.leased_until = max(self.leased_until, ends_at)
        return self.lease_s

    def blocked_s(self, now: float) -> float:
        """How long the guard, of this host, has been silent for no want of a processor: its own, or that of the
        supervisor's threads, one of which reads what guards send. To be called again and again while it is silent."""
        if self.starvation is None:
            self.starvation = StarvationOf(self.hello.guard_pid, os.getpid())
        silent_s = now - self.last_beat_at
        self.starved_s += self.starvation.new_wait_s(silent_s, now, 0.0)
        return silent_s - min(self.starved_s, STARVED_AT_MOST_S)

    @property
    def is_remote(self) -> bool:
        """Whether the guard is on another host: it can be reached by messages only."""
        return self.hello.host_id != host_id()

    def is_fenced(self, now: float) -> bool:
        """Whether the rank of a dying world on another host is dead for certain: its guard said so, or all leases
        are over, of which it may have got any."""
        fenced_at = max(self.last_beat_at + LEASE_S + FENCE_MARGIN_S, self.leased_until)
        return not self.is_remote or self.acknowledged or now >= fenced_at

    @property
    def guard(self) -> ProcessId:
        return ProcessId(self.hello.guard_pid, self.hello.guard_start)

    @property
    def process(self) -> ProcessId:
        return ProcessId(self.hello.pid, self.hello.start)


@dataclass(frozen=True)
class WorldFault:
    """Why a world has to die."""

    kind: str
    """exit, killed, frozen, hung, lost, mpirun or start."""
    rank: int | None
    host: str | None
    detail: str
    detect_s: float | None = None
    exit_code: int | None = None
    last_lines: str = ""
    doing: Doing | None = None
    stacks: str = ""


@dataclass
class WorldTimes:
    """Moments of a world's life on the monotonic clock, in seconds."""

    started: float = field(default_factory=time.monotonic)
    """Start of its mpirun; of a promoted spare, its promotion."""
    parked: float | None = None
    """When the last rank of a spare had parked."""
    active: float | None = None
    served: float | None = None
    """When the front was first welcomed."""
    aborted: float | None = None
    dead: float | None = None


@dataclass(frozen=True)
class WorldPlan:
    """What a world is started from; the same for each world of a deployment, until a planned change."""

    mpirun: mpirun.Mpirun
    tp: int
    pp: int
    cores: int
    rank_command: Sequence[str]
    """Without `--tp`, `--pp`, `--epoch` and what else differs between worlds, which the world adds."""
    guard_command: Sequence[str]
    served_model_name: str
    version: str = "1"
    """Grows with each planned change of the world."""
    hosts: Sequence[Host] = ()
    """This machine first, then the others; empty: all ranks run here."""
    elastic: bool = False
    """Whether a world may have fewer ranks while hosts are lost."""
    max_model_len: int = 0
    """Tokens that a request may have at most; 0: not known."""
    remote_endpoint: str = ""
    """Where the supervisor listens for guards of other hosts, like tcp://10.0.0.1:*."""
    interface: Interface | None = None
    """Over which the hosts are to reach each other; None: as they find."""
    wait_for_hosts_s: float | None = None
    """How long the other hosts may take to answer before the first world; None: they are not asked."""
    started_by: Launcher | None = None
    """What starts its worlds; None: `mpirun`."""

    @property
    def launcher(self) -> Launcher:
        """What starts its worlds."""
        return self.started_by or mpirun.MpirunLauncher(self.mpirun, self.interface)

    @property
    def size(self) -> int:
        """Ranks of a world."""
        return self.tp * self.pp
