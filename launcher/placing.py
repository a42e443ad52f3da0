"""Which rank runs on which host: the ranks of a tensor-parallel group stay together where the slots allow it, since
they exchange their sums twice in every layer. Called when the hosts of a world are chosen; it starts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from launcher.host_list import Host


@dataclass(frozen=True)
class RankPlace:
    """Where one rank of a world runs."""

    rank: int
    tp_rank: int
    pp_rank: int
    host: str
    """Empty: this machine."""
    local_rank: int
    """Its number among the ranks of that host."""
    local_size: int


def place(hosts: Sequence[Host], ranks: int, tp: int) -> tuple[Host, ...]:
    """The hosts with the slots that ranks fill, in the order of ranks. The first host, where rank 0 lives, stays the
    first and is never left out. A host is left at the end of a group if the others suffice for the rest; those that
    hold nothing but whole groups come before the rest. `ranks` is a multiple of `tp`, and there are as many slots."""
    first, others = hosts[:1], hosts[1:]
    order = [*first, *sorted(others, key=lambda host: host.slots % tp != 0)]
    placed, filled = [], 0
    for index, host in enumerate(order):
        later = sum(other.slots for other in order[index + 1 :])
        left = ranks - filled
        most = min(host.slots, left)
        at_a_border = most - (filled + most) % tp
        least = 1 if index == 0 else 0
        count = at_a_border if at_a_border >= least and left - at_a_border <= later else most
        if count > 0:
            placed.append(replace(host, slots=count))
            filled += count
    return tuple(placed)


def places(hosts: Sequence[Host], tp: int, pp: int) -> list[RankPlace]:
    """Of every rank; without hosts all of them on this machine."""
    of_host = [(host.name, host.slots) for host in hosts] or [("", tp * pp)]
    found: list[RankPlace] = []
    for name, slots in of_host:
        for local_rank in range(slots):
            rank = len(found)
            found.append(RankPlace(rank, rank % tp, rank // tp, name, local_rank, slots))
    return found


def split_groups(hosts: Sequence[Host], tp: int, pp: int) -> dict[int, list[str]]:
    """The stages whose tensor-parallel ranks are on several hosts, with those hosts."""
    of_stage: dict[int, list[str]] = {}
    for one in places(hosts, tp, pp):
        names = of_stage.setdefault(one.pp_rank, [])
        if one.host not in names:
            names.append(one.host)
    return {stage: names for stage, names in of_stage.items() if len(names) > 1}
