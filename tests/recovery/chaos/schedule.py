"""The schedule: which fault comes when and where. Drawn from (seed, number) alone, so that any fault of a run can be
had again; pure. Used by the campaign."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What is done to the target. The first group comes from outside, by signals; the second from inside a rank (see
    engine/faults.py), so that it happens at an exact place."""

    KILL = "kill"
    STOP = "stop"
    STOP_AND_GO = "stop for 1.5 s"
    SHORT_STOP = "stop for 200 ms"
    SEGMENTATION_FAULT = "segmentation fault"

    HANG = "hang in a step"
    HANG_IN_COLLECTIVE = "hang in a collective"
    SKIP_COLLECTIVE = "skipped collective"
    RAISE = "exception in a step"
    OUT_OF_MEMORY = "out of memory"
    KILL_IN_COLLECTIVE = "kill in a collective"
    KILL_IN_BROADCAST = "kill in mid-broadcast"
    STOP_IN_COLLECTIVE = "stop in a collective"

    # What befalls the machine, or the network, for some seconds; a rank dies meanwhile if it does not by itself.
    FULL_SHARED_MEMORY = "full /dev/shm and kill"
    FULL_DISK = "full disk and kill"
    CUT = "silent cut"
    CUT_TOWARDS = "cut of what is sent to it"
    CUT_BACK = "cut of what it sends"
    STOP_AND_KILL = "stop, then a rank is killed"


INSIDE = {
    Kind.HANG: "hang",
    Kind.HANG_IN_COLLECTIVE: "hang collective={collective}",
    Kind.SKIP_COLLECTIVE: "skip collective={collective}",
    Kind.RAISE: "raise",
    Kind.OUT_OF_MEMORY: "memory",
    Kind.KILL_IN_COLLECTIVE: "kill collective={collective}",
    Kind.KILL_IN_BROADCAST: "kill plan=sent",
    Kind.STOP_IN_COLLECTIVE: "stop collective={collective}",
}
"""How engine/faults.py is told."""

FREEZES = (Kind.STOP, Kind.STOP_AND_GO, Kind.STOP_IN_COLLECTIVE)
CUTS = (Kind.CUT, Kind.CUT_TOWARDS, Kind.CUT_BACK)
SHORTAGES = (Kind.FULL_SHARED_MEMORY, Kind.FULL_DISK)
HANGS = (Kind.HANG, Kind.HANG_IN_COLLECTIVE, Kind.SKIP_COLLECTIVE)


class Target(Enum):
    """Who is hit."""

    RANK = "rank"
    GUARD = "guard"
    MPIRUN = "mpirun"
    SPARE_RANK = "spare's rank"
    SPARE_GUARD = "spare's guard"
    SPARE_MPIRUN = "spare's mpirun"
    ALL_RANKS = "every rank"
    BOTH_WORLDS = "world and spare"
    FRONT = "front"
    SUPERVISOR = "supervisor"
    HOST = "second host"
    DAEMON = "second host's daemon of MPI"


class Place(Enum):
    """Where a deployment runs: what can happen to it depends on that."""

    USUAL = "usual"
    CRAMPED = "cramped"
    """Its shared memory and its disk are small, so that they can be filled."""
    HOSTS = "hosts"
    """Rank 1 is on another host, with a network between."""


OF_SPARE = (Target.SPARE_RANK, Target.SPARE_GUARD, Target.SPARE_MPIRUN, Target.BOTH_WORLDS)

OUTSIDE_WORLDS = (Target.FRONT, Target.SUPERVISOR)

PHASES = ("joining", "loading", "loaded")
"""Of a starting or promoted world, in which a second fault can hit it."""


@dataclass(frozen=True)
class Second:
    """A fault during the recovery from another: a rank of the next world dies, too, or front or supervisor."""

    target: Target
    rank: int
    phase: str | None
    """As the rank enters this phase; None: after `delay_s`, wherever it is."""
    delay_s: float


@dataclass(frozen=True)
class Fault:
    """One fault of the schedule."""

    number: int
    kind: Kind
    target: Target
    rank: int
    delay_s: float
    """Wait before it, from the moment at which everything flows again."""
    prefill: bool = False
    """Long prompts are sent just before."""
    collective: int = 1
    spare_parked: bool = True
    """Whether the spare is waited for first; else it may hit while the spare is being built."""
    second: Second | None = None
    lasts_s: float = 0.0
    """Of what befalls machine or network."""

    @property
    def label(self) -> str:
        text = f"{self.kind.value}: {self.target.value}"
        text += f" {self.rank}" if "rank" in self.target.value or "guard" in self.target.value else ""
        text += f", for {self.lasts_s:.1f} s" if self.lasts_s else ""
        text += ", in prefill" if self.prefill else ""
        if self.second is not None:
            where = f"in {self.second.phase}" if self.second.phase else f"after {self.second.delay_s:.1f} s"
            is_rank = self.second.target is Target.RANK
            whom = f"rank {self.second.rank} of the next world" if is_rank else self.second.target.value
            text += f", then {whom} {where}"
        return text


@dataclass(frozen=True)
class Deployment:
    """The shape of what is hit."""

    spare: str
    tp: int = 2
    pp: int = 1
    place: Place = Place.USUAL

    @property
    def size(self) -> int:
        return self.tp * self.pp

    @property
    def name(self) -> str:
        shape = " x ".join([f"tp {self.tp}"] * (self.tp > 1) + [f"pp {self.pp}"] * (self.pp > 1))
        place = "" if self.place is Place.USUAL else f", {self.place.value}"
        return f"{shape}, {self.spare}{place}"


# How often what is done to whom, against the others.
_OUTSIDE: list[tuple[Kind, Target, int]] = [
    (Kind.KILL, Target.RANK, 22),
    (Kind.KILL, Target.ALL_RANKS, 2),
    (Kind.KILL, Target.GUARD, 4),
    (Kind.KILL, Target.MPIRUN, 4),
    (Kind.STOP, Target.RANK, 10),
    (Kind.STOP_AND_GO, Target.RANK, 3),
    (Kind.STOP, Target.GUARD, 3),
    (Kind.SHORT_STOP, Target.RANK, 5),
    (Kind.SHORT_STOP, Target.GUARD, 2),
    (Kind.SHORT_STOP, Target.FRONT, 2),
    (Kind.SHORT_STOP, Target.MPIRUN, 1),
    (Kind.SHORT_STOP, Target.SUPERVISOR, 2),
    (Kind.SEGMENTATION_FAULT, Target.RANK, 3),
    (Kind.KILL, Target.FRONT, 7),
    (Kind.KILL, Target.SUPERVISOR, 4),
]
_INSIDE: list[tuple[Kind, Target, int]] = [
    (Kind.HANG, Target.RANK, 2),
    (Kind.HANG_IN_COLLECTIVE, Target.RANK, 2),
    (Kind.SKIP_COLLECTIVE, Target.RANK, 3),
    (Kind.RAISE, Target.RANK, 3),
    (Kind.OUT_OF_MEMORY, Target.RANK, 3),
    (Kind.KILL_IN_COLLECTIVE, Target.RANK, 4),
    (Kind.KILL_IN_BROADCAST, Target.RANK, 4),
    (Kind.STOP_IN_COLLECTIVE, Target.RANK, 2),
]
_OF_SPARE: list[tuple[Kind, Target, int]] = [
    (Kind.KILL, Target.SPARE_RANK, 4),
    (Kind.STOP, Target.SPARE_RANK, 2),
    (Kind.KILL, Target.SPARE_GUARD, 2),
    (Kind.KILL, Target.SPARE_MPIRUN, 2),
    (Kind.KILL, Target.BOTH_WORLDS, 3),
    (Kind.SHORT_STOP, Target.SPARE_RANK, 1),
]
_CRAMPED: list[tuple[Kind, Target, int]] = [
    (Kind.FULL_SHARED_MEMORY, Target.RANK, 5),
    (Kind.FULL_SHARED_MEMORY, Target.ALL_RANKS, 1),
    (Kind.FULL_SHARED_MEMORY, Target.FRONT, 1),
    (Kind.FULL_DISK, Target.RANK, 5),
    (Kind.FULL_DISK, Target.ALL_RANKS, 1),
    (Kind.KILL, Target.RANK, 1),
]
_OVER_HOSTS: list[tuple[Kind, Target, int]] = [
    (Kind.CUT, Target.HOST, 5),
    (Kind.CUT_TOWARDS, Target.HOST, 3),
    (Kind.CUT_BACK, Target.HOST, 3),
    (Kind.KILL, Target.DAEMON, 3),
    (Kind.STOP_AND_KILL, Target.DAEMON, 3),
    (Kind.KILL, Target.HOST, 3),
    (Kind.KILL, Target.RANK, 2),
]
_HAVE_SECOND = 0.16
"""Share of the faults of a world that are followed by another during the recovery."""


def draw(seed: int, number: int, deployment: Deployment) -> Fault:
    """Fault `number` of the run with this seed."""
    dice = random.Random(f"{seed} {number} {deployment.name}")
    if deployment.place is not Place.USUAL:
        return _draw_elsewhere(dice, number, deployment)
    choices = _OUTSIDE + _INSIDE
    if deployment.spare != "none":
        choices = choices + _OF_SPARE
    kind, target, _ = dice.choices(choices, [weight for _, _, weight in choices])[0]
    rank = dice.randrange(deployment.size)
    if kind is Kind.KILL_IN_BROADCAST:
        rank = 0
    if kind is Kind.SKIP_COLLECTIVE and deployment.tp == 1:
        rank = dice.randrange(deployment.size - 1)  # the last stage has none that it could skip
    second = None
    ends_world = target not in (*OF_SPARE, *OUTSIDE_WORLDS) and kind is not Kind.SHORT_STOP
    second_rank, phase = dice.randrange(deployment.size), dice.choice((None, None, *PHASES))
    second_delay_s = dice.uniform(0.0, 1.5)
    if dice.random() < _HAVE_SECOND and ends_world:
        whom = dice.choice((Target.RANK, Target.RANK, Target.RANK, *OUTSIDE_WORLDS))
        second = Second(whom, second_rank, phase if whom is Target.RANK else None, second_delay_s)
    return Fault(
        number=number,
        kind=kind,
        target=target,
        rank=rank,
        delay_s=dice.uniform(0.0, 2.0),
        prefill=dice.random() < 0.25 and kind not in INSIDE,
        collective=dice.randint(1, 20) if deployment.tp > 1 else 1,
        spare_parked=target in (*OF_SPARE, Target.SUPERVISOR) or dice.random() < 0.85,
        second=second,
    )


def _draw_elsewhere(dice: random.Random, number: int, deployment: Deployment) -> Fault:
    """Where the ranks are on several hosts, those of the first can be hit one by one, and the other as a whole."""
    choices = _CRAMPED if deployment.place is Place.CRAMPED else _OVER_HOSTS
    kind, target, _ = dice.choices(choices, [weight for _, _, weight in choices])[0]
    return Fault(
        number=number,
        kind=kind,
        target=target,
        rank=0 if deployment.place is Place.HOSTS else dice.randrange(deployment.size),
        delay_s=dice.uniform(0.0, 2.0),
        lasts_s=dice.uniform(2.0, 6.0) if kind in CUTS or kind in SHORTAGES else 0.0,
        prefill=dice.random() < 0.25,
        spare_parked=dice.random() < 0.85,
    )
