"""Who supervises this front: watches the supervisor's process, and hands the listening socket to the next one, so
that neither the end of a supervisor nor a later restart of the front refuses anybody.

Made by front.py. It ends nothing itself: control.py asks how long no supervisor has been there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from gateway.control_messages import of_front
from gateway.log import Logger

LISTENER_SOCKET = "listen.sock"
"""In the run folder; whoever connects to it is the next supervisor and gets the listening socket (SCM_RIGHTS)."""

SUPERVISOR_VARIABLE = "PHALANX_SUPERVISOR_PID"
"""Whose child this front is; without it, whoever its parent is once the imports are over."""
WAIT_VARIABLE = "PHALANX_ADOPTION_WAIT_S"
WAIT_S = 60.0
"""How long a front goes on without a supervisor."""


def adoption_wait_s(environment: Mapping[str, str] = os.environ) -> float:
    """The wait of this deployment, in seconds; what is no positive number counts as not set."""
    try:
        wait_s = float(environment.get(WAIT_VARIABLE, ""))
    except ValueError:
        return WAIT_S
    return wait_s if wait_s > 0 else WAIT_S


class Supervision:
    """The parent process at first; after it, whoever takes over."""

    def __init__(self, run_dir: Path | None, http_fd: int, log: Logger, front: int = 0) -> None:
        """To be made in the running loop. Without a run folder nobody can take over."""
        self._http_fd = http_fd
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._supervisor: int | None = None
        self._gone_at: float | None = None
        self._path = run_dir / of_front(LISTENER_SOCKET, front) if run_dir is not None else None
        self._server: socket.socket | None = None
        supervisor = int(os.environ.get(SUPERVISOR_VARIABLE) or os.getppid())
        self._watch(supervisor)
        # It may have ended while this front began, and another process may have its pid by now. As long as it is
        # this one's parent it is not reaped, so that what was opened is its own.
        if self._supervisor is not None and os.getppid() != supervisor:
            self._on_end()
        if self._path is not None:
            self._open(self._path)

    @property
    def gone_s(self) -> float | None:
        """For how many seconds no supervisor has been there; None while one is."""
        return None if self._gone_at is None else time.monotonic() - self._gone_at

    def close(self) -> None:
        self._unwatch()
        if self._server is not None:
            self._loop.remove_reader(self._server.fileno())
            self._server.close()
            with contextlib.suppress(OSError):
                assert self._path is not None
                self._path.unlink()

    # ----------------------------------------------------------------------- the supervisor's process

    def _watch(self, pid: int) -> None:
        self._unwatch()
        try:
            self._supervisor = os.pidfd_open(pid)
        except OSError:
            self._on_end()
            return
        self._gone_at = None
        self._loop.add_reader(self._supervisor, self._on_end)

    def _unwatch(self) -> None:
        if self._supervisor is not None:
            self._loop.remove_reader(self._supervisor)
            os.close(self._supervisor)
            self._supervisor = None

    def _on_end(self) -> None:
        self._unwatch()
        self._gone_at = time.monotonic()
        self._log.warning("supervisor gone", detail="the front serves on and waits for the next one")

    # ----------------------------------------------------------------------- handing over

    def _open(self, path: Path) -> None:
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            path.unlink(missing_ok=True)  # of a front that was killed
            server.bind(str(path))
            os.chmod(path, 0o600)
            server.listen()
        except OSError as error:
            server.close()
            self._log.warning("no take-over", detail=f"{path}: {error}")
            return
        self._server = server
        self._loop.add_reader(server.fileno(), self._accept)

    def _accept(self) -> None:
        assert self._server is not None
        try:
            link, _ = self._server.accept()
        except OSError:
            return
        with link:
            credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            pid, uid, _ = struct.unpack("3i", credentials)
            if uid != os.getuid():
                return
            with contextlib.suppress(OSError):  # it did not wait
                link.setblocking(False)
                socket.send_fds(link, [b"l"], [self._http_fd])
                self._watch(pid)
                self._log.info("supervisor took over", pid=pid)
