"""The signals by which mpirun ends its processes, made something that a poll sees. Used by the guard, in its main
thread; another thread may wake the poll as well."""

from __future__ import annotations

import contextlib
import signal
import socket


class EndSignals:
    """From its making on the process is not ended by them: `told_to_end` says that one has come."""

    def __init__(self) -> None:
        # The pair of sockets wakes the poll when a signal comes in.
        self._wake, self._write_end = socket.socketpair()
        self._wake.setblocking(False)
        self._write_end.setblocking(False)
        self.told_to_end = False
        signal.set_wakeup_fd(self._write_end.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def fileno(self) -> int:
        """Readable after a signal, or `wake`."""
        return self._wake.fileno()

    def wake(self) -> None:
        """From any thread: something has happened that the poll is to look at."""
        with contextlib.suppress(OSError):
            self._write_end.send(b"e")

    def drain(self) -> None:
        """After a poll that found it readable."""
        with contextlib.suppress(BlockingIOError):
            self._wake.recv(64)

    def _on_signal(self, number: int, frame: object) -> None:
        self.told_to_end = True
