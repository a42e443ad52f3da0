"""The hosts of a deployment: read from `--hosts`, chosen for each world, and left out while they are lost. Used by
`serve` and the supervisor; starts nothing and asks nobody."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import LauncherError, SettingsError

LOST_FOR_S = 60.0
"""How long a host that was lost is left out, as long as the others suffice."""

_ENTRY = re.compile(r"(?P<name>[^\s:=]+)(?::(?P<count>\d+)|\s+slots\s*=\s*(?P<slots>\d+))?")


@dataclass(frozen=True)
class Host:
    """A machine, and how many ranks of a world it may hold."""

    name: str
    slots: int


def parse_hosts(text: str) -> tuple[Host, ...]:
    """`host:slots,host:slots` or the path of a file with a `host slots=N` or `host:N` a line; without a number one
    slot. Raises SettingsError."""
    path = Path(text).expanduser()
    if path.is_file():
        lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    else:
        lines = [entry.strip() for entry in text.split(",")]
    hosts: dict[str, int] = {}
    for line in filter(None, lines):
        match = _ENTRY.fullmatch(line)
        if match is None:
            raise SettingsError(
                f"--hosts: cannot read {line!r}; write host:slots,host:slots or give a file with a "
                "`host slots=N` line for each host"
            )
        hosts[match["name"]] = hosts.get(match["name"], 0) + int(match["count"] or match["slots"] or 1)
    if text and not hosts:
        raise SettingsError(f"--hosts {text}: names no host")
    return tuple(Host(name, slots) for name, slots in hosts.items())


def check_slots(hosts: Sequence[Host], ranks: int) -> None:
    """Raises SettingsError if the world does not fit."""
    slots = sum(host.slots for host in hosts)
    if hosts and slots < ranks:
        raise SettingsError(f"--hosts has {slots} slots, but tp * pp are {ranks} ranks; add hosts or slots")


def address_towards(hosts: Sequence[Host]) -> str:
    """This machine's address as the other hosts reach it. Raises LauncherError."""
    for host in hosts[1:]:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((host.name, 9))  # sends nothing: it asks for the route
                address: str = probe.getsockname()[0]
                return address
        except OSError as error:
            raise LauncherError(
                f"--hosts: no way to {host.name} ({error.strerror}); check the name and the network"
            ) from None
    return "127.0.0.1"


class HostPool:
    """Which hosts the next world gets. The first one is the supervisor's own: rank 0 lives there."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._hosts = list(hosts)
        self._lost_at: dict[str, float] = {}

    def choose(self, ranks: int, now: float) -> tuple[Host, ...]:
        """As many as the ranks fill, with the slots that they fill: those that were lost lately come last."""
        order = sorted(self._hosts[1:], key=lambda host: self._is_lost(host.name, now))
        chosen, left = [], ranks
        for host in [*self._hosts[:1], *order]:
            if left > 0:
                chosen.append(Host(host.name, min(left, host.slots)))
                left -= host.slots
        return tuple(chosen)

    def on_lost(self, name: str, now: float) -> None:
        """Its guard fell silent."""
        self._lost_at[name] = now

    def _is_lost(self, name: str, now: float) -> bool:
        return now - self._lost_at.get(name, -LOST_FOR_S) < LOST_FOR_S


def host_of(hosts: Sequence[Host], rank: int) -> str:
    """Where a rank runs: slots are filled in order."""
    for host in hosts:
        if rank < host.slots:
            return host.name
        rank -= host.slots
    return ""
