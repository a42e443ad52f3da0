"""The hosts of a deployment (read by host_list): chosen for each world, and left out while they are lost or
fail again and again. Used by `serve` and the supervisor; starts nothing and asks nobody."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Sequence
from dataclasses import replace

from launcher.errors import LauncherError, SettingsError
from launcher.host_faults import HostFaults
from launcher.host_list import Host as Host
from launcher.host_list import parse_hosts as parse_hosts
from launcher.logs import EventLog

LOST_FOR_S = 60.0
"""How long a host that was lost is left out, as long as the others suffice."""


def check_slots(hosts: Sequence[Host], ranks: int) -> None:
    """Raises SettingsError if the world does not fit."""
    slots = sum(host.slots for host in hosts)
    if hosts and slots < ranks:
        raise SettingsError(f"--hosts has {slots} slots, but tp * pp are {ranks} ranks; add hosts or slots")


def address_towards(hosts: Sequence[Host]) -> str:
    """This machine's address as the other hosts reach it. Raises LauncherError."""
    if len(hosts) < 2:
        return "127.0.0.1"
    problems = []
    for host in hosts[1:]:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((host.name, 9))  # sends nothing: it asks for the route
                address: str = probe.getsockname()[0]
                return address
        except OSError as error:
            problems.append(f"no way to {host.name} ({error.strerror})")
    # The others may not be up yet, and have no addresses; this one has its own.
    with contextlib.suppress(OSError):
        own = socket.gethostbyname(hosts[0].name)
        if not own.startswith("127."):
            return own
    raise LauncherError(f"--hosts: {', '.join(problems)}; check the names and the network")


class HostPool:
    """Which hosts the next world gets. The first one is the supervisor's own: rank 0 lives there, whatever happens
    on it, so that a single host is never left out."""

    def __init__(self, hosts: Sequence[Host], log: EventLog) -> None:
        self._hosts = list(hosts)
        self._log = log
        self._lost_at: dict[str, float] = {}
        self._faults = HostFaults()
        self._told_until: dict[str, float] = {}
        """Until when a host is left out, as it was last logged."""

    def choose(self, ranks: int, now: float) -> tuple[Host, ...]:
        """As many as the ranks fill, with the slots that they fill: those with several faults lately only where the
        rest does not suffice, and those that were lost lately last of all, the latest of them at the very end."""
        own, others = self._hosts[:1], self._hosts[1:]
        present = {host.name: host.slots for host in others if not self._is_lost(host.name, now)}
        beside_own = ranks - sum(host.slots for host in own)
        kept = self._faults.choose(present, beside_own, now)
        for name in present.keys() - kept.keys():
            self._tell_left_out(name, now)
        lost = [host for host in others if host.name not in present]
        lost.sort(key=lambda host: self._lost_at[host.name])  # the longer ago, the likelier it is back
        chosen, left = [], ranks
        for host in [*own, *(host for host in others if host.name in kept), *lost]:
            if left > 0:
                chosen.append(replace(host, slots=min(left, host.slots)))
                left -= host.slots
        return tuple(chosen)

    def on_fault(self, name: str, kind: str, now: float) -> None:
        """A world died of a rank on this host; "lost": its guard fell silent."""
        self._faults.note(name or None, kind, now)
        if kind == "lost":
            self._lost_at[name] = now

    def on_silent(self, name: str, now: float) -> None:
        """It does not answer: another host takes its place, if there is one."""
        self._lost_at[name] = now

    def _is_lost(self, name: str, now: float) -> bool:
        return now - self._lost_at.get(name, -LOST_FOR_S) < LOST_FOR_S

    def _tell_left_out(self, name: str, now: float) -> None:
        until = self._faults.until(name)
        if self._told_until.get(name) == until:
            return
        self._told_until[name] = until
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + until - now))
        self._log.warning(
            "host left out while others suffice",
            host=name,
            faults=", ".join(self._faults.kinds(name)),
            until=moment,
        )


def host_of(hosts: Sequence[Host], rank: int) -> str:
    """Where a rank runs: slots are filled in order."""
    for host in hosts:
        if rank < host.slots:
            return host.name
        rank -= host.slots
    return ""
