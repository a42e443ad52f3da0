"""What systemd is told, by a socket in its place; and whether it would take the unit file."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.service_manager import ServiceManager

UNIT = Path(__file__).parents[2] / "packaging" / "phalanx.service"


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(tmp_path / "notify") if request.param == "path" else f"\0phalanx-{os.getpid()}")
        bound.setblocking(False)
        yield bound


def address(listener: socket.socket) -> str:
    name = listener.getsockname()
    return "@" + name[1:].decode() if isinstance(name, bytes) else str(name)


def test_what_systemd_hears(listener: socket.socket) -> None:
    environment = {"NOTIFY_SOCKET": address(listener), "WATCHDOG_USEC": "2000000", "PATH": "/bin"}
    manager = ServiceManager(environment)
    assert environment == {"PATH": "/bin"}, "ranks must not speak for the supervisor"
    manager.beat()
    manager.ready("serving")
    manager.beat()
    manager.beat()
    manager.stopping()
    manager.stopping()
    heard = [listener.recv(1000) for _ in range(3)]
    assert heard == [b"READY=1\nSTATUS=serving", b"WATCHDOG=1", b"STOPPING=1"]
    with pytest.raises(BlockingIOError):
        listener.recv(1000)


def test_a_watchdog_of_another_process_is_not_fed(listener: socket.socket) -> None:
    other = {"NOTIFY_SOCKET": address(listener), "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
    manager = ServiceManager(other)
    manager.ready("serving")
    manager.beat()
    assert listener.recv(1000).startswith(b"READY=1")
    with pytest.raises(BlockingIOError):
        listener.recv(1000)


def test_without_systemd_nothing_happens() -> None:
    manager = ServiceManager({})
    manager.ready("serving")
    manager.beat()
    manager.stopping()
    ServiceManager({"NOTIFY_SOCKET": "/nowhere/at/all"}).ready("serving")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze, of systemd")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """With this environment's command and root in place of those that are installed."""
    text = UNIT.read_text().replace("/opt/phalanx/bin/phalanx", f"{sys.prefix}/bin/phalanx")
    (tmp_path / "phalanx.service").write_text(text.replace("User=phalanx", "User=root"))
    answer = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(tmp_path / "phalanx.service")],
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0 and "phalanx.service" not in answer.stderr, answer.stderr
