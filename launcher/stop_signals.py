"""SIGINT, SIGTERM, SIGHUP and, where it has a meaning, SIGUSR1 as something that a poll loop can wait for. Used
by `serve` and `pull`."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from types import TracebackType

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_KEY_WITHIN_S = 0.1
"""Ctrl-C comes from the terminal, and again from a wrapper that passes it on; nobody presses it twice so soon."""
SAME_WITHIN_S = 1.0
"""The same for what programs send: timeout(1), shells that are hung up on and `scancel --full` send twice."""


class StopSignals:
    """A context in which these signals end nothing by themselves: they count, and make `fileno` readable. A process
    that was asked to stop has only its end before it after that: more of them do nothing any more."""

    def __init__(self, stops_at_hangup: bool = True, leaves_at_usr1: bool = False) -> None:
        """`stops_at_hangup`: SIGHUP is one of them; else it is counted apart. `leaves_at_usr1`: so is SIGUSR1."""
        self.count = 0
        self.leaves = False
        """Whether SIGUSR1 was the first: the deployment is to go on elsewhere."""
        self._more = (signal.SIGUSR1,) if leaves_at_usr1 else ()
        self._stops_at_hangup = stops_at_hangup
        self._hangups = 0
        self._counted_at = float("-inf")

    def __enter__(self) -> StopSignals:
        self._read_end, self._write_end = socket.socketpair()
        self._read_end.setblocking(False)
        self._write_end.setblocking(False)
        # `nohup phalanx serve` goes on when its terminal is closed.
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        numbers = [number for number in (*_NUMBERS, *self._more) if not (ignored and number == signal.SIGHUP)]
        self._old_handlers = {number: signal.signal(number, self._on_signal) for number in numbers}
        self._old_wakeup = signal.set_wakeup_fd(self._write_end.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._old_handlers.items():
            # A Ctrl-C that is held would kill the interpreter on its way out, and hide what it has to say.
            signal.signal(number, signal.SIG_IGN if self.count else handler)
        self._read_end.close()
        self._write_end.close()

    def fileno(self) -> int:
        return self._read_end.fileno()

    def drain(self) -> None:
        """Makes `fileno` unreadable until the next signal."""
        with contextlib.suppress(BlockingIOError):
            self._read_end.recv(1024)

    def request(self) -> None:
        """As a first signal would; after one it changes nothing."""
        self.count = max(1, self.count)

    def requested(self) -> bool:
        return self.count > 0

    def take_hangup(self) -> bool:
        """Whether SIGHUP, which stops nothing here, has come since the last call."""
        found, self._hangups = self._hangups > 0, 0
        return found

    def _on_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGHUP and not self._stops_at_hangup:
            self._hangups += 1
        elif number != signal.SIGUSR1:
            now = time.monotonic()
            if now - self._counted_at >= (SAME_KEY_WITHIN_S if number == signal.SIGINT else SAME_WITHIN_S):
                self._counted_at = now
                self.count += 1
        elif self.count == 0:  # told twice is not told to hurry
            self.leaves = True
            self.count = 1
