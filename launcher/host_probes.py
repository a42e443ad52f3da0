"""Asks hosts that are lost, or may be, again and again whether a command can be started there, while worlds go on.
Used by host_watch.py; must never block, and leaves no process behind."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import IO

from launcher.processes import ProcessId, all_processes, kill, reap_orphan

TIMEOUT_S = 10.0
"""How long one may take; on a network that swallows everything nothing else ends it."""
PAUSE_S = 1.0
"""From an answer to the next question to a host that is lost; half as much again each time."""
MAX_PAUSE_S = 15.0
SWEEP_S = 0.5


@dataclass
class _Probe:
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    ends_at: float


@dataclass
class _Asked:
    probe: _Probe | None = None
    next_at: float = 0.0
    pause_s: float = PAUSE_S


@dataclass(frozen=True)
class Answer:
    """`reason`: why no rank can be started there; None if one can."""

    host: str
    reason: str | None


Start = Callable[[str, IO[bytes]], subprocess.Popen[bytes]]


@dataclass
class HostProbes:
    """One probe at a time for each host."""

    start: Start
    _asked: dict[str, _Asked] = field(default_factory=dict)
    _left: set[int] = field(default_factory=set)
    """Sessions of probes that have ended, of which processes may be left."""
    _sweep_at: float = 0.0

    def ask(self, hosts: Iterable[str], now: float) -> None:
        """Asks these now, unless they are being asked."""
        for host in hosts:
            asked = self._asked.setdefault(host, _Asked())
            asked.pause_s = PAUSE_S
            if asked.probe is None:
                self._start(host, asked, now)

    def poll(self, lost: Iterable[str], now: float) -> list[Answer]:
        """What has come in since the last call. Those that are lost are asked again and again."""
        for host in lost:
            asked = self._asked.setdefault(host, _Asked(next_at=now + PAUSE_S))
            if asked.probe is None and now >= asked.next_at:
                self._start(host, asked, now)
        if self._left and now >= self._sweep_at:
            self._sweep_at = now + SWEEP_S
            self._sweep()
        answers = []
        for host, asked in self._asked.items():
            if asked.probe is None:
                continue
            code = asked.probe.process.poll()
            if code is None and now < asked.probe.ends_at:
                continue
            reason = None
            if code is None:
                reason = f"no answer within {TIMEOUT_S:.0f} s"
            elif code != 0:
                reason = _last_line(asked.probe.output) or f"exit code {code}"
            self._end(asked.probe)
            asked.probe = None
            asked.next_at = now + asked.pause_s
            asked.pause_s = min(1.5 * asked.pause_s, MAX_PAUSE_S)
            answers.append(Answer(host, reason))
        return answers

    @property
    def is_asking(self) -> bool:
        return any(asked.probe is not None for asked in self._asked.values())

    def close(self) -> None:
        """Ends those that are under way."""
        for asked in self._asked.values():
            if asked.probe is not None:
                self._end(asked.probe)
                asked.probe = None
        self._sweep()

    def _end(self, probe: _Probe) -> None:
        if probe.process.returncode is None:
            probe.process.kill()
            probe.process.wait()
        probe.output.close()
        self._left.add(probe.process.pid)

    def _sweep(self) -> None:
        """Ends what probes have left: the program may have children."""
        left = set()
        for stat in list(all_processes()):
            if stat.session in self._left:
                left.add(stat.session)
                if stat.state in "ZX":
                    reap_orphan(stat.pid)
                else:
                    kill(ProcessId(stat.pid, stat.start))
        self._left = left

    def _start(self, host: str, asked: _Asked, now: float) -> None:
        output = tempfile.TemporaryFile()  # noqa: SIM115 it lives as long as the probe
        try:
            asked.probe = _Probe(self.start(host, output), output, now + TIMEOUT_S)
        except OSError:  # a full disk, or no more processes: it says nothing about the host
            output.close()
            asked.next_at = now + asked.pause_s


def by_commands(probe: Callable[[str], Sequence[str]], environment: dict[str, str]) -> Start:
    """Probes by the command that `probe` gives for a host: the way that mpirun takes."""

    def start(host: str, output: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            probe(host),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    return start


def _last_line(output: IO[bytes]) -> str:
    output.seek(0)
    lines = output.read(65536).decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
