"""The server end of the protocol: one ROUTER, the table of its clients, and the messages that it answers
itself.

Shared by the gateway in rank 0 and by the front's ZeroMQ endpoint; both call it from one thread. It must
never block, never trust a frame, and never wait for a slow client.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import zmq

from gateway.curve import ServerKeys
from gateway.errors import EndpointError
from gateway.protocol import (
    HEARTBEAT_INTERVAL_S,
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Cancel,
    ClientMessage,
    Credit,
    ErrorCode,
    Failed,
    Hello,
    Ping,
    Pong,
    ProtocolError,
    ServerMessage,
    Submit,
    Welcome,
    decode_client_message,
    encode,
)

CLIENT_SILENCE_S = 3 * HEARTBEAT_INTERVAL_S
"""A client that has said nothing for so long is gone."""

SILENCE_CHECK_S = 0.5
MAX_FRAMES_PER_DRAIN = 4096
"""A flood of messages must not hold the caller's loop: the rest waits for the next call."""
MAX_CLIENTS = 4096
HIGH_WATER_MARK = 10_000
"""Messages queued for one client, or from one; a client that lets more pile up is treated as lost."""

KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 15, 5, 3
"""TCP asks a connection that is silent for so long, so often: that of a host that vanished is closed, and its memory
freed. ZMTP's own heartbeats would do the same, but there are clients that end a connection on which a PING comes."""


class _Client:
    __slots__ = ("last_seen", "requests")

    def __init__(self, now: float) -> None:
        self.last_seen = now
        self.requests: set[str] = set()


class Router:
    """A client is known from its `Hello` until it is lost: unreachable, too slow, or silent. Messages of
    unknown clients are answered with `Failed(not_connected)`, so that a client whose connection was
    replaced under it notices."""

    endpoint: str
    """As bound, with the real port."""

    def __init__(
        self,
        endpoint: str,
        welcome: Callable[[], Welcome | None],
        epoch: int,
        on_greeted: Callable[[bytes], None] = lambda client: None,
        curve: ServerKeys | None = None,
    ) -> None:
        """Binds `endpoint` (`tcp://127.0.0.1:*` takes a free port). `welcome` makes the answer to a Hello;
        while it gives None, clients that say hello wait for `greet_waiting`. `epoch` is what the server's own
        messages carry; `on_greeted` is called after a client was welcomed. `curve`: connections are
        encrypted, and only listed clients get one. Raises EndpointError."""
        self._welcome = welcome
        self._on_greeted = on_greeted
        self._epoch = epoch
        self._clients: dict[bytes, _Client] = {}
        self._ungreeted: dict[bytes, None] = {}
        self._lost: list[bytes] = []
        self._next_silence_check = 0.0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.set(zmq.ROUTER_MANDATORY, 1)
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.SNDHWM, HIGH_WATER_MARK)
        self.socket.set(zmq.RCVHWM, HIGH_WATER_MARK)
        self.socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self.socket.set(zmq.TCP_KEEPALIVE, 1)
        self.socket.set(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_IDLE_S)
        self.socket.set(zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_INTERVAL_S)
        self.socket.set(zmq.TCP_KEEPALIVE_CNT, KEEPALIVE_COUNT)
        self.socket.set(zmq.IPV6, int("[" in endpoint))
        self._authentication = None if curve is None else curve.authenticate(self._context, self.socket)
        try:
            self.socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            reason = zmq.strerror(error.errno or 0)
            raise EndpointError(f"cannot listen at {endpoint}: {reason}; choose another endpoint") from None
        self.endpoint = self.socket.get_string(zmq.LAST_ENDPOINT)

    def readable(self) -> bool:
        """Whether a message waits; never blocks."""
        return bool(int(self.socket.get(zmq.EVENTS)) & zmq.POLLIN)

    def drain(self) -> list[tuple[bytes, Submit | Cancel | Credit]]:
        """All requests that are there, as (client identity, message), without blocking.

        A Submit's id is new for its client, the id of a Cancel or Credit is of a request that still runs.
        """
        now = time.monotonic()
        requests: list[tuple[bytes, Submit | Cancel | Credit]] = []
        for _ in range(MAX_FRAMES_PER_DRAIN):
            if not self.readable():
                break
            try:
                frames = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:  # the peer went away between the two calls
                break
            client = frames[0]
            if len(frames) != 2:
                self._refuse(client, f"{len(frames) - 1} frames; a message is one frame")
                continue
            try:
                message = decode_client_message(frames[1])
            except ProtocolError as error:
                self._refuse(client, str(error))
                continue
            request = self._handle(client, message, now)
            if request is not None:
                requests.append((client, request))
        # After the drain: what arrived while this process was late has been seen by now.
        if now >= self._next_silence_check:
            self._next_silence_check = now + SILENCE_CHECK_S
            for client, state in list(self._clients.items()):
                if now - state.last_seen > CLIENT_SILENCE_S:
                    self._lose(client)
        return requests

    def lost_clients(self) -> list[bytes]:
        """The clients lost since the last call; the caller cancels their requests. Call it before `drain`."""
        if not self._lost:
            return []
        lost, self._lost = self._lost, []
        return lost

    def finish(self, client: bytes, request_id: str) -> None:
        """The request ended: its id is free again."""
        state = self._clients.get(client)
        if state is not None:
            state.requests.discard(request_id)

    def fail(
        self,
        client: bytes,
        request_id: str,
        code: ErrorCode,
        message: str,
        retry_after_s: float | None = None,
    ) -> None:
        """Ends a request with Failed."""
        self.finish(client, request_id)
        self.send(client, Failed(self._epoch, request_id, code, message, retry_after_s))

    def send(self, client: bytes, message: ServerMessage) -> None:
        """Sends to a client that is known; to others nothing."""
        if client in self._clients:
            self._send(client, encode(message))

    def broadcast(self, message: ServerMessage) -> None:
        """Sends to every known client."""
        frame = encode(message)
        for client in list(self._clients):
            self._send(client, frame)

    def greet_waiting(self) -> None:
        """Welcomes the clients that said hello before there was a welcome to give."""
        waiting, self._ungreeted = self._ungreeted, {}
        for client in waiting:
            self._greet(client, Hello(), time.monotonic())

    def close(self) -> None:
        """Closes the socket at once; what is not sent yet is dropped."""
        if self._authentication is not None:
            self._authentication.stop()
        self._context.destroy(linger=0)

    def _handle(self, client: bytes, message: ClientMessage, now: float) -> Submit | Cancel | Credit | None:
        """Answers what the server answers itself; returns what is for the caller."""
        if isinstance(message, Hello):
            self._greet(client, message, now)
            return None
        state = self._clients.get(client)
        if state is None:
            if client in self._ungreeted and isinstance(message, Ping):
                return None
            request_id = message.request_id if isinstance(message, Submit) else None
            text = "this connection is not known (any more): say hello, then submit again"
            self._send(client, encode(Failed(self._epoch, request_id, "not_connected", text)))
            return None
        state.last_seen = now
        if isinstance(message, Ping):
            self._send(client, encode(Pong(message.sent_at, self._epoch)))
            return None
        if not isinstance(message, Submit):
            return message if message.request_id in state.requests else None
        if message.request_id in state.requests:
            # Without the id: the answer must not look like the end of the request that runs.
            self._refuse(client, f"request id {message.request_id!r} is already in use on this connection")
            return None
        state.requests.add(message.request_id)
        return message

    def _greet(self, client: bytes, hello: Hello, now: float) -> None:
        if client in self._lost:
            # Its old requests are not cancelled yet; the next hello finds a clean table.
            self._send(client, encode(Failed(self._epoch, None, "not_connected", "say hello again")))
            return
        if not hello.min_version <= PROTOCOL_VERSION <= hello.max_version:
            self._refuse(
                client,
                f"this server speaks protocol version {PROTOCOL_VERSION}, "
                f"the client {hello.min_version} to {hello.max_version}",
            )
            return
        if client not in self._clients and len(self._clients) + len(self._ungreeted) >= MAX_CLIENTS:
            text = f"{MAX_CLIENTS} clients are connected already; try again later"
            self._send(client, encode(Failed(self._epoch, None, "overloaded", text)))
            return
        welcome = self._welcome()
        if welcome is None:
            self._ungreeted[client] = None
            return
        self._clients.setdefault(client, _Client(now)).last_seen = now
        self._send(client, encode(welcome))
        self._on_greeted(client)

    def _refuse(self, client: bytes, problem: str) -> None:
        self._send(client, encode(Failed(self._epoch, None, "bad_message", problem)))

    def _send(self, client: bytes, frame: bytes) -> None:
        """A client that is gone (EHOSTUNREACH) or does not read (EAGAIN) is lost."""
        try:
            self.socket.send(client, zmq.SNDMORE | zmq.DONTWAIT)
            self.socket.send(frame, zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self._lose(client)

    def _lose(self, client: bytes) -> None:
        if self._clients.pop(client, None) is not None:
            self._lost.append(client)
