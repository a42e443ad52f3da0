"""ZeroMQ sockets in an asyncio loop, without a future a message.

Used by connection.py (links to servers) and by the front. A ZeroMQ socket shows its events through a file
descriptor that is edge-triggered: whoever touches the socket may swallow the edge, so that one must look
again after each use. ReadPump does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq

Socket = zmq.Socket[bytes]

MAX_MESSAGES_PER_TURN = 1000
"""Other work of the loop gets its turn after so many."""


class ReadPump:
    """Calls `drain` whenever the socket has messages. `drain` takes what is there, or some of it."""

    def __init__(self, socket: Socket, drain: Callable[[], None]) -> None:
        """To be made in the running loop; call `close` before the socket is closed."""
        self._socket = socket
        self._drain = drain
        self._loop = asyncio.get_running_loop()
        self._scheduled = False
        self._closed = False
        self._fd = int(socket.get(zmq.FD))
        self._loop.add_reader(self._fd, self._run)
        self.check()

    def check(self) -> None:
        """To be called after each send: it may have swallowed the sign that messages came. Looks once in a turn of
        the loop, however many sends there were: a look costs two system calls."""
        if not self._scheduled and not self._closed:
            self._scheduled = True
            self._loop.call_soon(self._look)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)

    def _look(self) -> None:
        self._scheduled = False
        if not self._closed and int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._run()

    def _run(self) -> None:
        if not self._closed:
            self._drain()
            self.check()


def receive_frames(socket: Socket, handle: Callable[[list[bytes]], None]) -> None:
    """Hands over the messages that are there, at most MAX_MESSAGES_PER_TURN. `handle` may close the
    socket."""
    for _ in range(MAX_MESSAGES_PER_TURN):
        # Asking first is cheaper than the exception of a vain attempt.
        if socket.closed or not int(socket.get(zmq.EVENTS)) & zmq.POLLIN:
            return
        handle(socket.recv_multipart(zmq.DONTWAIT))
