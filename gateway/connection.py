"""The client end of the protocol: one DEALER in an asyncio loop, from hello to loss.

Under AsyncClient and under the front's link to rank 0. It greets, beats, notices that the server is gone, and
drops what carries a foreign epoch; it never reconnects by itself: whoever uses it decides what that means.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

from gateway.curve import ClientKeys
from gateway.errors import ConnectionLost, EndpointError
from gateway.protocol import (
    HEARTBEAT_INTERVAL_S,
    MAX_MESSAGE_BYTES,
    ClientMessage,
    Failed,
    Hello,
    Ping,
    Pong,
    ProtocolError,
    ServerMessage,
    Tokens,
    Welcome,
    decode_server_message,
    encode,
)
from gateway.sockets import ReadPump, Socket, receive_frames

SERVER_SILENCE_S = 3 * HEARTBEAT_INTERVAL_S
HIGH_WATER_MARK = 100_000
_REFUSALS = {
    int(
        zmq.EVENT_HANDSHAKE_FAILED_AUTH
    ): "it does not let this client's key in (authorized_clients, docs/zeromq.md)",
    int(
        zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    ): "one side uses CURVE keys and the other does not, or not these ones",
    int(
        zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    ): "it ended the handshake: its CURVE keys are not those given here, or one side uses none",
}
"""What became of a connection that was never one, for a person."""
_EVENTS = int(zmq.EVENT_DISCONNECTED) | sum(_REFUSALS)


class Connection:
    """One connection to rank 0 or to the front.

    `on_welcome` is called once, then `on_message` for each Tokens, Failed and Stats; `on_lost` once at the
    end, if the end was not `close`: the peer closed the connection, has been silent for `silence_s`,
    refused us, or does not know us any more. All are called in the loop in which the connection was made.
    """

    welcome: Welcome | None = None

    def __init__(
        self,
        context: zmq.Context[Socket],
        endpoint: str,
        *,
        on_welcome: Callable[[Welcome], None],
        on_message: Callable[[ServerMessage], None],
        on_lost: Callable[[str], None],
        on_drained: Callable[[], None] = lambda: None,
        name: str = "",
        silence_s: float = SERVER_SILENCE_S,
        curve: ClientKeys | None = None,
    ) -> None:
        """`on_drained` is called when all messages that were there have been handed over.

        Starts to connect; a server that is not there yet is waited for. Raises EndpointError for an
        endpoint that is none."""
        self._on_welcome = on_welcome
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_drained = on_drained
        self._silence_s = silence_s
        self.endpoint = endpoint
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._to_send: list[ClientMessage] = []
        self._socket = context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.SNDHWM, HIGH_WATER_MARK)
        self._socket.set(zmq.RCVHWM, HIGH_WATER_MARK)
        self._socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.set(zmq.IPV6, int("[" in endpoint))
        self._socket.set(zmq.RECONNECT_IVL, 20)
        self._socket.set(zmq.RECONNECT_IVL_MAX, 1000)
        if curve is not None:
            curve.apply(self._socket)
        # Without keys a handshake that ends is a server that ends: it may be back soon.
        events = _EVENTS if curve is not None else _EVENTS & ~int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
        self._monitor = self._socket.get_monitor_socket(events)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._close_sockets()
            reason = zmq.strerror(error.errno or 0)
            raise EndpointError(f"cannot connect to {endpoint!r}: {reason}") from None
        self._pump = ReadPump(self._socket, self._drain)
        self._monitor_pump = ReadPump(self._monitor, self._drain_monitor)
        self._last_received = time.monotonic()
        self._next_beat = self._last_received + HEARTBEAT_INTERVAL_S
        self._beat_timer = self._loop.call_later(HEARTBEAT_INTERVAL_S, self._beat)
        self.send(Hello(client=name))

    def send(self, message: ClientMessage) -> None:
        """Queues a message. Raises ConnectionLost when the connection is closed, or its queue is full."""
        if self._closed:
            raise ConnectionLost(f"the connection to {self.endpoint} is closed; connect again")
        try:
            self._socket.send(encode(message), zmq.DONTWAIT)
        except zmq.Again:
            self._lose("it takes no messages")
            raise ConnectionLost(f"{self.endpoint} takes no messages; connect again") from None
        self._pump.check()

    def send_soon(self, message: ClientMessage) -> None:
        """Queues a message at the end of this turn of the loop, with the others of the turn: a socket that is asleep
        is woken once for all of them. Where `send` would raise, the connection is lost."""
        self._to_send.append(message)
        if len(self._to_send) == 1:
            self._loop.call_soon(self._send_all)

    def _send_all(self) -> None:
        messages, self._to_send = self._to_send, []
        try:
            for message in messages:
                self.send(message)
        except ConnectionLost:  # whoever sent them is told by `on_lost`
            return

    def close(self) -> None:
        """Closes at once; `on_lost` is not called."""
        if self._closed:
            return
        self._closed = True
        self._beat_timer.cancel()
        self._pump.close()
        self._monitor_pump.close()
        self._close_sockets()

    def _close_sockets(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)

    def _drain(self) -> None:
        receive_frames(self._socket, self._receive)
        self._on_drained()

    def _receive(self, frames: list[bytes]) -> None:
        self._last_received = time.monotonic()
        try:
            message = decode_server_message(b"".join(frames))
        except ProtocolError as error:
            self._lose(f"it does not speak this protocol: {error}")
            return
        if isinstance(message, Pong):
            return
        if isinstance(message, Welcome):
            if self.welcome is None:
                self.welcome = message
                self._on_welcome(message)
            return
        if isinstance(message, Failed) and (self.welcome is None or message.code == "not_connected"):
            self._lose(message.message)
            return
        # The front names the epochs of whichever worlds serve it; a world names only its own.
        own = self.welcome is not None and self.welcome.epoch in (0, message.epoch)
        if own or not isinstance(message, Tokens):
            self._on_message(message)

    def _drain_monitor(self) -> None:
        reason = ""
        while int(self._monitor.get(zmq.EVENTS)) & zmq.POLLIN:
            event = parse_monitor_message(self._monitor.recv_multipart(zmq.DONTWAIT))["event"]
            reason = _REFUSALS.get(int(event), reason or "it closed the connection")
        if reason:
            # A new connection would be a stranger to the server. First take what came before the end.
            self._drain()
            if self.welcome is None and reason not in _REFUSALS.values():
                reason += " before it said a word: it goes away just now, or it wants a CURVE key"
            self._lose(reason)

    def _beat(self) -> None:
        now = time.monotonic()
        # A process that was stopped itself has no reason to suspect the other side.
        self._last_received += max(0.0, now - self._next_beat)
        if now - self._last_received > self._silence_s:
            self._lose(f"it has been silent for {now - self._last_received:.1f} s")
            return
        self._next_beat = now + HEARTBEAT_INTERVAL_S
        self._beat_timer = self._loop.call_later(HEARTBEAT_INTERVAL_S, self._beat)
        try:
            self.send(Ping(now))
        except ConnectionLost:
            return

    def _lose(self, reason: str) -> None:
        if not self._closed:
            self.close()
            self._on_lost(reason)
