"""What the supervisor tells systemd, where systemd started it: that it is ready, alive, stopping. Used by `serve`;
without systemd nothing is sent. The protocol is sd_notify(3)'s: datagrams of assignments."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping

SOCKET_VARIABLE = "NOTIFY_SOCKET"
WATCHDOG_VARIABLE = "WATCHDOG_USEC"
WATCHDOG_PID_VARIABLE = "WATCHDOG_PID"


class ServiceManager:
    """The socket of a service manager, if there is one."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        """Takes its variables out of the environment: they are for this process alone."""
        self._address = environment.pop(SOCKET_VARIABLE, "")
        watchdog = environment.pop(WATCHDOG_VARIABLE, "")
        for_pid = environment.pop(WATCHDOG_PID_VARIABLE, "")
        is_ours = for_pid in ("", str(os.getpid()))
        self._interval_s = int(watchdog) / 2e6 if watchdog.isdigit() and is_ours else 0.0
        """How often to say that this process lives: half of what it may be silent; 0: nobody asks."""
        self._next_beat = 0.0
        self._is_ready = self._is_stopping = False

    def ready(self, status: str) -> None:
        """It serves."""
        self._is_ready = True
        self._send(f"READY=1\nSTATUS={status}")

    def beat(self) -> None:
        """To be called often: the main loop turns."""
        now = time.monotonic()
        if self._is_ready and self._interval_s and now >= self._next_beat:
            self._next_beat = now + self._interval_s
            self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """It will end. Again and again says nothing new."""
        if not self._is_stopping:
            self._is_stopping = True
            self._send("STOPPING=1")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        # An address that begins with @ is an abstract one (unix(7)).
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
            link.sendto(text.encode(), socket.MSG_DONTWAIT, address)
