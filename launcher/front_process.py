"""The front as a process: started with the listening socket, restarted when it ends, told of the worlds.
Owned by the supervisor; must never block, nor close the listening socket while the deployment lives."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import zmq

from gateway.control_messages import FrontState, WorldTable, decode_control_message, encode_control_message
from gateway.protocol import ProtocolError
from launcher.errors import LauncherError
from launcher.processes import AdoptedProcess, ProcessId
from launcher.watch import EXIT_CONFIG

SUPERVISOR_VARIABLE = "PHALANX_SUPERVISOR_PID"
"""Environment variable that tells the front whose child it should be."""

_RESTARTS_IN_A_ROW = 3
"""Of a front that ended soon without having said a word."""
_SPOKEN_RESTARTS_IN_A_ROW = 10
"""Of one that had begun to serve: somebody may be killing it."""
_STABLE_AFTER_S = 10.0


class FrontProcess:
    """Raises LauncherError from `check` when no restart can help any more."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        command: Sequence[str],
        environment: dict[str, str],
        listener: socket.socket,
        control_socket: Path,
        log_path: Path,
    ) -> None:
        self._command = list(command)
        self._environment = environment
        self._listener = listener
        self.log_path = log_path
        self.state: FrontState | None = None
        """The last word of the front that runs now."""
        self._process: subprocess.Popen[bytes] | AdoptedProcess | None = None
        self._identity: bytes | None = None
        self._started_at = 0.0
        self._short_lives = 0
        self.router = context.socket(zmq.ROUTER)
        self.router.linger = 0
        self.router.maxmsgsize = 1 << 20
        self.router.router_mandatory = True
        self.router.bind(f"ipc://{control_socket}")

    def start(self) -> None:
        """Starts it in a session of its own, output to the run folder. Raises OSError."""
        self.state = None
        self._identity = None
        self._started_at = time.monotonic()
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env={**self._environment, SUPERVISOR_VARIABLE: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[self._listener.fileno()],
                start_new_session=True,
            )

    def adopt(self, process: ProcessId) -> None:
        """Takes over the front of an earlier supervisor, which finds the control socket by itself."""
        self._started_at = time.monotonic()
        with contextlib.suppress(ProcessLookupError):  # ended just now: `run` starts another one
            self._process = AdoptedProcess(process)

    @property
    def is_there(self) -> bool:
        """Whether one was started or adopted, and has not been found dead."""
        return self._process is not None

    @property
    def started_at(self) -> float:
        """Start of the front that runs now, on the monotonic clock."""
        return self._started_at

    @property
    def process(self) -> ProcessId | None:
        """The running front; None if there is none."""
        if self._process is None or self._process.returncode is not None:
            return None
        return ProcessId.of(self._process.pid)

    def receive(self) -> list[FrontState]:
        """What the front said since the last call."""
        states: list[FrontState] = []
        while True:
            try:
                identity, *frames = self.router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return states
            try:
                message = decode_control_message(frames[0] if len(frames) == 1 else b"")
            except ProtocolError:
                continue
            # The front that was here before may have left a word in the queue.
            if isinstance(message, FrontState) and self._process and message.pid == self._process.pid:
                self._identity = identity
                self.state = message
                states.append(message)

    def send(self, table: WorldTable) -> None:
        """Tells the front of the worlds, if it is there."""
        if self._identity is not None:
            # Gone, or too busy to read; the next table says it all again.
            with contextlib.suppress(zmq.ZMQError):
                self.router.send_multipart([self._identity, encode_control_message(table)], zmq.NOBLOCK)

    def check(self, now: float) -> int | None:
        """Its exit code if it has just ended, after which the caller starts it again. Raises LauncherError if
        it said that no restart helps, or ended too often in a row."""
        if self._process is None or (code := self._process.poll()) is None:
            return None
        self._process = None
        most = _RESTARTS_IN_A_ROW if self.state is None else _SPOKEN_RESTARTS_IN_A_ROW
        self.state = None
        self._identity = None
        if code == EXIT_CONFIG:
            raise LauncherError(
                last_error_line(self.log_path) or f"the front cannot start; see {self.log_path}"
            )
        self._short_lives = self._short_lives + 1 if now - self._started_at < _STABLE_AFTER_S else 0
        if self._short_lives >= most:
            raise LauncherError(f"the front ended {self._short_lives} times in a row; see {self.log_path}")
        return code

    def kill(self) -> None:
        """SIGKILLs it; `check` sees its end."""
        if self._process is not None:
            self._process.kill()

    def terminate(self, at_once: bool = False) -> None:
        """Asks it to finish: it stops accepting, and ends when what runs has finished or its drain timeout is
        over. `at_once`: it tells its clients that it ends, and does."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT if at_once else signal.SIGTERM)

    def has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def end(self) -> None:
        """Kills whatever is left of its session, and reaps it."""
        if self._process is None:
            return
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(timeout=10)
        self._process = None

    def close(self) -> None:
        self.router.close()


def last_error_line(path: Path) -> str:
    """The last line that a process left for its user, without the program's name before it."""
    prefix = "phalanx: error: "
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        if line.startswith(prefix):
            return line.removeprefix(prefix)
    return ""
