"""The hosts of a deployment (read by host_list): chosen for each world, and left out while they are lost or
fail again and again. Used by `serve` and the supervisor; starts nothing and asks nobody."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from launcher.errors import LauncherError, SettingsError
from launcher.host_faults import HostFaults
from launcher.host_list import Host as Host
from launcher.host_list import parse_hosts as parse_hosts
from launcher.launchers import Launcher, remote_shell
from launcher.logs import EventLog
from launcher.placing import place


def with_own_name(hosts: Sequence[Host]) -> tuple[Host, ...]:
    """The first one by the name that this machine has for itself, if it is this machine with its domain, or without:
    mpirun resolves no names, and would reach for it over the network."""
    own = socket.gethostname()
    if not hosts or hosts[0].name.partition(".")[0] != own.partition(".")[0]:
        return tuple(hosts)
    return (replace(hosts[0], name=own), *hosts[1:])


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


@dataclass(frozen=True)
class Loss:
    """Since when a host is lost, and how that was found out."""

    at: float
    """On the monotonic clock."""
    unix_at: float
    reason: str


class HostPool:
    """Which hosts the next world gets. The first one is the supervisor's own: rank 0 lives there, whatever happens
    on it, so that a single host is never left out. One that is lost stays so until somebody says that it is back."""

    def __init__(self, hosts: Sequence[Host], log: EventLog, launcher: Launcher | None = None) -> None:
        """`launcher`: what starts worlds there; None: mpirun."""
        self.hosts = list(hosts)
        self._launcher = launcher
        self._log = log
        self.lost: dict[str, Loss] = {}
        self._faults = HostFaults()
        self._told_until: dict[str, float] = {}
        """Until when a host is left out, as it was last logged."""

    @property
    def others(self) -> list[str]:
        """All but the supervisor's own."""
        return [host.name for host in self.hosts[1:]]

    def probe(self, environment: Mapping[str, str], name: str) -> list[str]:
        """The command that asks one whether commands can be started there."""
        host = next(host for host in self.hosts if host.name == name)
        if self._launcher is not None:
            return self._launcher.probe(environment, host)
        return remote_shell.probe(environment, host.name, host.user, host.port)

    def slots_present(self, now: float, with_suspects: bool = True) -> int:
        """Of the hosts that are not lost; suspects are those with several faults lately."""
        suspects = [] if with_suspects else self._faults.suspects(now)
        own, others = self.hosts[:1], self.hosts[1:]
        kept = [host for host in others if host.name not in self.lost and host.name not in suspects]
        return sum(host.slots for host in [*own, *kept])

    def choose(self, ranks: int, now: float, tp: int = 1) -> tuple[Host, ...]:
        """As many as the ranks fill, with the slots that they fill: those with several faults lately only where the
        rest does not suffice, and those that are lost last of all, the latest of them at the very end.
        Groups of `tp` ranks stay on one host where the slots allow it."""
        own, others = self.hosts[:1], self.hosts[1:]
        present = {host.name: host.slots for host in others if host.name not in self.lost}
        beside_own = ranks - sum(host.slots for host in own)
        kept = self._faults.choose(present, beside_own, now)
        for name in present.keys() - kept.keys():
            self._tell_left_out(name, now)
        lost = [host for host in others if host.name not in present]
        lost.sort(key=lambda host: self.lost[host.name].at)  # the longer ago, the likelier it is back
        usable = [*own, *(host for host in others if host.name in kept)]
        while lost and sum(host.slots for host in usable) < ranks:
            usable.append(lost.pop(0))
        return place(usable, ranks, tp)

    def on_fault(self, name: str, kind: str, now: float) -> None:
        """A world died of a rank on this host; "lost": its guard fell silent."""
        self._faults.note(name or None, kind, now)
        if kind == "lost":
            self.on_lost(name, "its guards fell silent", now)

    def on_lost(self, name: str, reason: str, now: float) -> None:
        """It cannot be reached, or is dead."""
        if name in self.others and name not in self.lost:
            self.lost[name] = Loss(now, time.time(), reason)
            self._log.warning("host lost", host=name, reason=reason)

    def refuse(self, name: str, ranks: int, reason: str) -> bool:
        """Leaves out for good a host that does not fit the others, if the rest has so many slots; else False."""
        rest = [host for host in self.hosts if host.name != name]
        if not self.hosts or name == self.hosts[0].name or sum(host.slots for host in rest) < ranks:
            return False
        self.hosts = rest
        self.lost.pop(name, None)
        self._log.warning("host does not fit the others, and is left out", host=name, reason=reason)
        return True

    def on_back(self, name: str, now: float) -> None:
        """Ranks can be started on it."""
        if (loss := self.lost.pop(name, None)) is not None:
            self._log.info("host is back", host=name, lost_s=now - loss.at)

    def describe_lost(self) -> str | None:
        """Who is lost and why, for people; None if nobody is."""
        lost = ", ".join(f"{name} ({loss.reason})" for name, loss in self.lost.items())
        return f"lost: {lost}" if lost else None

    def state_of(self, host: Host, in_use: bool, now: float) -> str:
        """As HostEntry.state."""
        if in_use:
            return "in use"
        if host.name in self.lost:
            return "lost"
        is_own = host is self.hosts[0]
        return "left out" if not is_own and host.name in self._faults.suspects(now) else "spare"

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
