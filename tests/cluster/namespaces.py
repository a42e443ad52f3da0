"""Hosts on one machine: network namespaces, joined by a router in a namespace of its own that can cut them off. The
first host shares its processes with this one; the others have process ids, a name and shared memory of their own."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
SLEEP = ["sh", "-c", "ip link set lo up && exec sleep infinity"]
OWN_ALL = ["--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]


def why_not() -> str | None:
    """Why this machine cannot have such hosts; None if it can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            return f"needs `{tool}`, of iproute2 or util-linux"
    probe = subprocess.run(
        [
            "unshare",
            "--net",
            *OWN_ALL,
            "sh",
            "-c",
            "ip link add up0 type veth peer name up1 && mount -t tmpfs tmpfs /dev/shm",
        ],
        capture_output=True,
        text=True,
    )
    return f"no namespaces with veth pairs here: {probe.stderr.strip()}" if probe.returncode else None


class Cluster:
    """`count` hosts 10.77.1.2, 10.77.2.2, ..., each on a network of its own with the router at .1."""

    def __init__(self, count: int, folder: Path) -> None:
        self._started: list[subprocess.Popen[str]] = []
        self._router = self._start(["unshare", "--net", *SLEEP])
        self._run(self._router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        self._hosts = [self._start(["unshare", "--net", *SLEEP])]
        self._others: dict[int, subprocess.Popen[str]] = {}
        """All but the first, by number: what holds their namespaces."""
        for index in range(2, count + 1):
            self._hosts.append(self._start_host(index))
        for index in range(1, count + 1):
            self._connect(index)
        agent = folder / "launch_agent"
        agent.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/cluster/launch_agent.py "$@"\n')
        agent.chmod(0o755)
        self.variables = {"PRTE_MCA_plm_ssh_agent": str(agent), "HYDRA_LAUNCHER_EXEC": str(agent)}
        """For mpirun."""
        self.names = [f"10.77.{index}.2" for index in range(1, count + 1)]
        self.prefix = ["nsenter", "--net", "--target", str(self._hosts[0]), "--"]
        """Of a command that is to run on the first host."""
        self.first_pid = self._hosts[0]
        """A process that does nothing, whose network is that of the first host."""
        for name in self.names[1:]:
            self._wait_reachable(name)

    def _connect(self, index: int) -> None:
        host, net = self._hosts[index - 1], f"10.77.{index}"
        self._run(self._router, "ip", "link", "add", f"r{index}", "type", "veth", "peer", "name", "up0")
        self._run(self._router, "ip", "link", "set", "up0", "netns", str(host))
        self._run(self._router, "ip", "addr", "add", f"{net}.1/24", "dev", f"r{index}")
        self._run(self._router, "ip", "link", "set", f"r{index}", "up")
        self._run(host, "ip", "addr", "add", f"{net}.2/24", "dev", "up0")
        self._run(host, "ip", "link", "set", "up0", "up")
        self._run(host, "ip", "route", "add", "default", "via", f"{net}.1")

    def _wait_reachable(self, name: str) -> None:
        """A link takes a moment to come up."""
        trial = f"import socket; socket.create_connection(({name!r}, 2222), 0.5).close()"
        for _ in range(20):
            if (
                subprocess.run([*self.prefix, sys.executable, "-c", trial], capture_output=True).returncode
                == 0
            ):
                return
        raise AssertionError(f"{name} cannot be reached")

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This thread, and what it starts, is on the first host's network meanwhile."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        first = os.open(f"/proc/{self.first_pid}/ns/net", os.O_RDONLY)
        try:
            _set_network(first)
            yield
        finally:
            _set_network(before)
            os.close(first)
            os.close(before)

    def close(self) -> None:
        """With their last process the namespaces go, and the links with them."""
        for process in self._started:
            process.kill()
            process.wait()

    def pid(self, host: int) -> int:
        """A process that does nothing, in the namespaces of a host (2 is the second)."""
        return self._hosts[host - 1]

    def _start(self, command: list[str]) -> int:
        self._started.append(subprocess.Popen(command, text=True))
        time.sleep(0.2)  # for unshare to have become the shell, and the shell sleep
        return self._started[-1].pid

    def _start_host(self, index: int) -> int:
        agent = [sys.executable, "-m", "tests.cluster.host_agent", f"host{index}"]
        command = ["unshare", "--net", *OWN_ALL, *agent]
        host = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, cwd=ROOT)
        self._started.append(host)
        self._others[index] = host
        assert host.stdout is not None and host.stdout.readline() == "up\n"
        return psutil.Process(host.pid).children()[0].pid

    def _run(self, pid: int, *command: str) -> None:
        subprocess.run(["nsenter", "--net", "--target", str(pid), "--", *command], check=True)

    # ----------------------------------------------------------------- what can happen to a host

    def kill(self, host: int, at_once: bool = True) -> None:
        """Ends a host but the first with all that runs on it. `at_once`: its network goes first, as when the power
        fails; else its processes' last words are still heard."""
        if at_once:
            self._run(self._router, "ip", "link", "del", f"r{host}")
        self._others[host].kill()
        self._others[host].wait()

    def revive(self, host: int) -> None:
        """A killed host is there again, with nothing running on it."""
        command = ["nsenter", "--net", "--target", str(self._router), "--", "ip", "link", "del", f"r{host}"]
        subprocess.run(command, capture_output=True)  # the kernel may still be about to take it down
        self._hosts[host - 1] = self._start_host(host)
        self._connect(host)
        self._wait_reachable(self.names[host - 1])

    # ----------------------------------------------------------------- what can happen to a network

    def cut(self, host: int, towards: bool = True, back: bool = True) -> None:
        """The router drops, without a word, what goes to a host (2 is the second), and what comes from it."""
        if towards:
            self._run(self._router, "ip", "rule", "add", "to", f"10.77.{host}.0/24", "blackhole")
        if back:
            self._run(self._router, "ip", "rule", "add", "iif", f"r{host}", "blackhole")

    def heal(self, host: int) -> None:
        for rule in (["to", f"10.77.{host}.0/24"], ["iif", f"r{host}"]):
            command = ["nsenter", "--net", "--target", str(self._router), "--"]
            subprocess.run([*command, "ip", "rule", "del", *rule], capture_output=True)

    def pid_of(self, host: int) -> int:
        """Process 1 of a host but the first, as it is seen from here."""
        return self._hosts[host - 1]

    def processes(self, host: int) -> list[psutil.Process]:
        """Everything on a host but the first one, less its process 1."""
        try:
            return psutil.Process(self._hosts[host - 1]).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


def _set_network(descriptor: int) -> None:
    """setns(2), which Python has from 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, 0x40000000) != 0:  # CLONE_NEWNET
        raise OSError(ctypes.get_errno(), "setns")


@contextmanager
def cluster(count: int, folder: Path) -> Iterator[Cluster]:
    hosts = Cluster(count, folder)
    try:
        yield hosts
    finally:
        hosts.close()
