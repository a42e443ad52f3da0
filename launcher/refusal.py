"""Whether a supervisor on another host has ended, or only cannot be reached: its host refuses connections to a port
that nobody listens at any more. Used by guards; does not block once it is made."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
from urllib.parse import urlsplit

AGAIN_S = 0.1
"""Seconds between two tries where the answer was neither yes nor no."""


class Refusal:
    """Asks an endpoint of ZeroMQ over TCP, again and again, until something is proven."""

    def __init__(self, endpoint: str) -> None:
        """Finds the name's address now: later that may take long."""
        parts = urlsplit(endpoint)
        self._address: tuple[object, ...] | None = None
        self._family = socket.AF_INET
        with contextlib.suppress(OSError):
            found = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
            self._family, self._address = found[0][0], found[0][4]
        self._try: socket.socket | None = None
        self._next_at = 0.0

    def look(self, now: float) -> bool | None:
        """True: refused, so that the host lives and nobody listens. False: somebody listens. None: not known yet."""
        if self._try is None:
            if self._address is None or now < self._next_at:
                return None
            self._next_at = now + AGAIN_S
            self._try = socket.socket(self._family)
            self._try.setblocking(False)
            error = self._try.connect_ex(self._address)
            if error not in (0, errno.EINPROGRESS):
                return self._answer(error)
        poll = select.poll()
        poll.register(self._try, select.POLLOUT)
        if not poll.poll(0):
            return None
        return self._answer(self._try.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _answer(self, error: int) -> bool | None:
        assert self._try is not None
        self._try.close()
        self._try = None
        return {0: False, errno.ECONNREFUSED: True}.get(error)
