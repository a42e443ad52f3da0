"""Whether a world is what was asked for: the same software and the same weights on each host, room for its shared
memory, clocks that agree. Judged from what guards and ranks report in any case; it costs the world nothing and asks
nobody. Called by the world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.guard_messages import RankFacts
from launcher.hosts import Host, host_of
from launcher.launchers.flavors import Flavor
from launcher.watch import EXIT_CONFIG
from launcher.world_records import RankWatch, WorldFault

MISMATCH = "mismatch"
"""Kind of the fault: it lies with a host, and another host may do."""
SHORTAGE = "shortage"
"""The same, and it may pass: shared memory is full, in which a world has fitted if one has served."""
CLOCKS_APART_S = 2.0
_MIB = 1 << 20


@dataclass(frozen=True)
class _Fact:
    """One thing that has to be the same everywhere."""

    name: str
    title: str
    remedy: str


_FACTS = (
    _Fact("python", "Python", "start the same Python there"),
    _Fact("phalanx", "Phalanx", "install the same version there, or bring the checkout up to date"),
    _Fact("mpi", "the MPI library", "install the same one there; LD_LIBRARY_PATH may lead to another"),
    _Fact("mpi4py", "mpi4py", "`{prefix}/bin/pip install mpi4py=={wanted}` there"),
    _Fact("torch", "torch", "`{prefix}/bin/pip install torch=={wanted}` there"),
    _Fact(
        "config", "the config.json of the model", "copy {model} there again, or share it between the hosts"
    ),
    _Fact("weights", "the weights", "copy {model} there again, or share it between the hosts"),
)


def find_mismatch(hosts: Sequence[Host], ranks: Mapping[int, RankWatch], flavor: Flavor) -> WorldFault | None:
    """The first thing in which a host is not as the first one, whose ranks are the measure; None as long as nothing
    of the kind is known."""
    return _find_small_shared_memory(hosts, ranks, flavor) or _find_other_software(hosts, ranks)


def clock_warnings(hosts: Sequence[Host], ranks: Mapping[int, RankWatch]) -> list[str]:
    """One for each host whose clock is not ours: nothing depends on it but what people read in logs."""
    found = {}
    for rank, watch in sorted(ranks.items()):
        if watch.is_remote and watch.clock_ahead_s is not None and abs(watch.clock_ahead_s) > CLOCKS_APART_S:
            way = "ahead of" if watch.clock_ahead_s > 0 else "behind"
            found[_name(hosts, ranks, rank)] = f"{abs(watch.clock_ahead_s):.0f} s {way} the clock here"
    return [
        f"the clock of {host} is {text}; times in logs do not agree, set up NTP"
        for host, text in found.items()
    ]


def _find_other_software(hosts: Sequence[Host], ranks: Mapping[int, RankWatch]) -> WorldFault | None:
    first = ranks.get(0)
    if first is None or first.facts is None:
        return None
    for fact in _FACTS:
        wanted = _value(first.facts, fact)
        for rank, watch in sorted(ranks.items()):
            is_elsewhere = watch.hello.host_id != first.hello.host_id
            value = _value(watch.facts, fact) if watch.facts is not None and is_elsewhere else ""
            if wanted and value and value != wanted:
                assert watch.facts is not None
                remedy = fact.remedy.format(wanted=wanted, prefix=watch.facts.prefix, model=watch.facts.model)
                detail = (
                    f"{_name(hosts, ranks, rank)} differs from {_name(hosts, ranks, 0)} in {fact.title}: {value} "
                    f"instead of {wanted}; {remedy}"
                )
                return WorldFault(MISMATCH, rank, watch.hello.host, detail, exit_code=EXIT_CONFIG)
    return None


def _find_small_shared_memory(
    hosts: Sequence[Host], ranks: Mapping[int, RankWatch], flavor: Flavor
) -> WorldFault | None:
    of_machine: dict[str, list[int]] = {}
    for rank, watch in ranks.items():
        of_machine.setdefault(watch.hello.host_id, []).append(rank)
    for members in of_machine.values():
        rank = min(members)
        free, needed = ranks[rank].hello.shm_free_bytes, shared_memory_bytes(flavor, len(members))
        if 0 <= free < needed:
            detail = (
                f"/dev/shm of {_name(hosts, ranks, rank)} has {free / _MIB:.0f} MiB free, and MPI wants "
                f"{needed / _MIB:.0f} MiB for {len(members)} ranks; make room or enlarge it "
                "(mount -o remount,size=1g /dev/shm; docker run --shm-size 1g; a memory-backed emptyDir)"
            )
            return WorldFault(SHORTAGE, rank, ranks[rank].hello.host, detail, exit_code=EXIT_CONFIG)
    return None


def shared_memory_bytes(flavor: Flavor, ranks: int) -> int:
    """What has to be free for so many ranks of one host. Open MPI asks for the whole segment of a rank, 16 MiB, to be
    free when it makes it, and gives up MPI_Init otherwise, although it then uses little of it; MPICH makes one
    segment of about 1 MiB a rank. As measured with Open MPI 5.0 and MPICH 5.0."""
    if ranks == 1:
        return 0
    return 17 * _MIB if flavor is Flavor.OPEN_MPI else 2 * _MIB * ranks


def _value(facts: RankFacts, fact: _Fact) -> str:
    value: str = getattr(facts, fact.name)
    # A patch release of Python changes nothing that ranks share.
    return ".".join(value.split(".")[:2]) if fact.name == "python" else value


def _name(hosts: Sequence[Host], ranks: Mapping[int, RankWatch], rank: int) -> str:
    """As the user calls it, and as it calls itself."""
    given, own = host_of(hosts, rank), ranks[rank].hello.host
    return own if given in ("", own) else f"{given} ({own})"
