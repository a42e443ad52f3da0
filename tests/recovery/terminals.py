"""A command on a terminal of its own, as a person starts it: keys go in, what is shown comes out. Used by the tests
of signals; everything under the command is found again by a mark in its environment."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from launcher.processes import environment_of
from tests.recovery.run_processes import end_with_parent, is_left

MARK = "PHALANX_TEST_MARK"
CTRL_C, CTRL_Z = "\x03", "\x1a"


def marked(mark: str) -> list[psutil.Process]:
    """Every living process that inherited this mark."""
    found = []
    for process in psutil.process_iter():
        if environment_of(process.pid).get(MARK) == mark and is_left(process):
            found.append(process)
    return found


def serve_command(model: Path, run_dir: Path, *flags: str) -> list[str]:
    """`phalanx serve` on free ports."""
    command = [sys.executable, "-m", "launcher.cli", "serve", str(model), "--run-dir", str(run_dir)]
    command += ["--port", "0", "--zmq", "tcp://127.0.0.1:*", "--grpc-port", "0"]
    return [*command, "--kv-cache-memory", "16MiB", *flags]


class Leftovers:
    """What a run may leave behind; ask while it runs, and again when it has ended."""

    def __init__(self, run_dir: Path, mark: str) -> None:
        self._run_dir = run_dir
        self._mark = mark
        self._run_ids: set[str] = set()

    def note(self) -> None:
        """Keeps the id of the run, which an orderly end removes."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            self._run_ids.add(json.loads((self._run_dir / "processes.json").read_text())["run_id"])

    def left(self) -> list[str]:
        """Processes, sockets and shared memory that are there now."""
        self.note()
        found = [f"process {p.pid} {' '.join(p.cmdline())[-80:]}" for p in marked(self._mark)]
        found += [f"socket {path.name}" for path in self._run_dir.glob("*.sock")]
        found += [f"/dev/shm/{p.name}" for i in self._run_ids for p in Path("/dev/shm").glob(f"*{i}*")]
        return found

    def wait_none(self, timeout_s: float = 10.0) -> list[str]:
        """What is still left after this time."""
        deadline = time.monotonic() + timeout_s
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left


class Terminal:
    """Leave the context to hang up, and to kill what is still there."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
        """The command leads the session and the foreground of the terminal, as if started by a login."""
        self.mark = uuid.uuid4().hex
        environment = {**os.environ, MARK: self.mark, "TERM": "xterm", **(variables or {})}
        self._shown = b""
        self._changed = threading.Condition()
        self._reading = threading.Lock()
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            end_with_parent()
            os.execvpe(command[0], list(command), environment)
        self._code: int | None = None
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        for process in marked(self.mark):
            process.kill()
        self.wait(10)

    @property
    def shown(self) -> str:
        with self._changed:
            return self._shown.decode(errors="replace").replace("\r\n", "\n")

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def wait_shown(self, text: str, timeout_s: float = 120.0, times: int = 1) -> None:
        """Until this stands there so many times."""
        deadline = time.monotonic() + timeout_s
        while self.shown.count(text) < times:
            assert time.monotonic() < deadline and (self.poll() is None or text in self.shown), self.shown
            with self._changed:
                self._changed.wait(0.2)

    def poll(self) -> int | None:
        """Exit code of the command, -N for signal N; None while it lives."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout_s: float = 30.0) -> int:
        deadline = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, self.shown
            time.sleep(0.01)
        return code

    def hang_up(self) -> None:
        """Closes the terminal, as a window is closed or a connection lost."""
        with self._reading:
            if self._terminal >= 0:
                os.close(self._terminal)
                self._terminal = -1

    def _read(self) -> None:
        while True:
            # One that waited in read(2) would keep the terminal from being hung up.
            with self._reading:
                if self._terminal < 0:
                    return
                try:
                    ready = select.select([self._terminal], [], [], 0.05)[0]
                    chunk = os.read(self._terminal, 65536) if ready else None
                except OSError:  # the other end is closed
                    return
            if chunk is None:
                continue
            with self._changed:
                self._shown += chunk
                self._changed.notify_all()
