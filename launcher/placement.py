"""Whether a world runs where it should: Open MPI happily starts every rank on one host. Called by the world once all
guards have reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launcher.hosts import Host, host_of
from launcher.processes import host_id
from launcher.watch import EXIT_CONFIG
from launcher.world_records import RankWatch, WorldFault


def find_misplaced(hosts: Sequence[Host], ranks: Mapping[int, RankWatch]) -> WorldFault | None:
    """A fault that no relaunch can help, if the ranks of a host do not share one machine, those of two hosts do, or
    rank 0 is not beside the supervisor. None without hosts."""
    if not hosts:
        return None
    wanted = {rank: host_of(hosts, rank) for rank in ranks}
    machines = {rank: watch.hello.host_id for rank, watch in ranks.items()}
    pairs = {(wanted[rank], machines[rank]) for rank in ranks}
    if len(pairs) == len({name for name, _ in pairs}) == len({machine for _, machine in pairs}):
        if machines[0] == host_id():
            return None
        detail = f"rank 0 runs on {ranks[0].hello.host}; name this machine first in --hosts"
    else:
        where = ", ".join(f"rank {rank} on {watch.hello.host}" for rank, watch in sorted(ranks.items()))
        asked = ", ".join(f"{host.slots} on {host.name}" for host in hosts)
        detail = (
            f"the ranks are not where --hosts puts them: {where}, instead of {asked}; check that each name is "
            "another machine and that mpirun reads host files"
        )
    return WorldFault("start", None, None, detail, exit_code=EXIT_CONFIG)
