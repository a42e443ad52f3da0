"""The front's line to the supervisor: world tables in, the front's state out, over the control socket.

It never decides anything about worlds; it notices that nobody is left to serve for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq

from gateway.control_messages import FrontState, WorldTable, decode_control_message, encode_control_message
from gateway.log import Logger
from gateway.protocol import MAX_MESSAGE_BYTES, ProtocolError
from gateway.sockets import ReadPump, Socket, receive_frames

STATE_INTERVAL_S = 1.0
"""A new supervisor learns of the front by its next word."""


class Control:
    """A DEALER to the supervisor's ROUTER."""

    def __init__(
        self,
        context: zmq.Context[Socket],
        endpoint: str,
        state: Callable[[], FrontState],
        on_table: Callable[[WorldTable], None],
        on_orphaned: Callable[[], None],
        log: Logger,
        gone_s: Callable[[], float | None],
        orphan_s: float,
    ) -> None:
        """`on_orphaned` is called when no supervisor has been there for `orphan_s`, as `gone_s` tells."""
        self._state = state
        self._on_table = on_table
        self._on_orphaned = on_orphaned
        self._log = log
        self._gone_s = gone_s
        self._orphan_s = orphan_s
        self._socket = context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.SNDHWM, 100)
        self._socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.set(zmq.RECONNECT_IVL, 50)
        self._socket.connect(endpoint)
        self._pump = ReadPump(self._socket, self._drain)
        self._timer: asyncio.TimerHandle | None = None
        self._tick()

    def send_state(self) -> None:
        """Tells the supervisor the front's state now."""
        try:
            self._socket.send(encode_control_message(self._state()), zmq.DONTWAIT)
        except zmq.Again:  # no supervisor for a long time; the next one gets what is true then
            return
        self._pump.check()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._pump.close()
        self._socket.close(0)

    def _tick(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(STATE_INTERVAL_S, self._tick)
        self.send_state()
        if (self._gone_s() or 0.0) > self._orphan_s:
            self._on_orphaned()

    def _drain(self) -> None:
        receive_frames(self._socket, self._receive)

    def _receive(self, frames: list[bytes]) -> None:
        try:
            message = decode_control_message(b"".join(frames))
        except ProtocolError as error:
            self._log.error("control message", detail=str(error))
            return
        if isinstance(message, WorldTable):
            self._on_table(message)
