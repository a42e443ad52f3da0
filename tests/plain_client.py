"""A ZeroMQ client made of pyzmq and msgpack alone, after docs/zeromq.md; nothing of the project is imported."""

from __future__ import annotations

import time
from typing import Any

import msgpack
import zmq

HEARTBEAT_S = 2.5


class PlainClient:
    """One connection. Messages are dictionaries; outputs of all requests are kept by their ids."""

    def __init__(
        self, endpoint: str, keys: tuple[bytes, bytes, bytes] | None = None, quiet: bool = False, **hello: Any
    ) -> None:
        """`quiet`: the caller says hello itself."""
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        if keys is not None:
            self.socket.curve_serverkey, self.socket.curve_publickey, self.socket.curve_secretkey = keys
        self.socket.connect(endpoint)
        self.outputs: dict[str, list[list[Any]]] = {}
        self.failures: dict[str, dict[str, Any]] = {}
        self.others: list[dict[str, Any]] = []
        self._beat_at = time.monotonic() + HEARTBEAT_S
        if quiet:
            return
        self.send(type="hello", **{"min_version": 1, "max_version": 1, "client": "plain", **hello})

    def __enter__(self) -> PlainClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def send(self, **message: Any) -> None:
        self.socket.send(msgpack.packb(message))
        self._beat_at = time.monotonic() + HEARTBEAT_S

    def submit(self, request_id: str, **fields: Any) -> None:
        self.outputs[request_id] = []
        self.send(type="submit", request_id=request_id, **fields)

    def receive(self, timeout_s: float = 20.0) -> dict[str, Any]:
        """The next message, sorted in. Beats while it waits."""
        deadline = time.monotonic() + timeout_s
        while True:
            now = time.monotonic()
            if now > deadline:
                raise TimeoutError(f"nothing came for {timeout_s:g} s")
            if now >= self._beat_at:  # also while messages come: the server wants to hear of us
                self.send(type="ping", sent_at=now)
            if self.socket.poll(max(0, int((min(self._beat_at, deadline) - now) * 1000))):
                break
        message: dict[str, Any] = msgpack.unpackb(self.socket.recv())
        if message["type"] == "tokens":
            for output in message["outputs"]:
                self.outputs.setdefault(output[0], []).append(output)
        elif message["type"] == "failed" and message["request_id"] is not None:
            self.failures[message["request_id"]] = message
        else:
            self.others.append(message)
        return message

    def answer(self, kind: str) -> dict[str, Any]:
        """The next message of a kind, or the refusal in its place."""
        while (message := self.receive())["type"] not in (kind, "failed"):
            pass
        return message

    def settle(self) -> None:
        """Until what was sent has had its effect. Pings are answered before the messages that came with them."""
        for number in (-1.0, -2.0):
            self.send(type="ping", sent_at=number)
            while (message := self.receive())["type"] != "pong" or message["sent_at"] != number:
                pass

    def finish(self, request_id: str) -> None:
        """Until the request has ended, either way."""
        deadline = time.monotonic() + 60
        while not self.ended(request_id) and request_id not in self.failures:
            assert time.monotonic() < deadline, f"{request_id} does not end: {self.others[-3:]}"
            self.receive()

    def ended(self, request_id: str) -> bool:
        outputs = self.outputs[request_id]
        return bool(outputs) and outputs[-1][3] is not None

    def tokens(self, request_id: str) -> list[int]:
        """What came, whose positions must be contiguous."""
        tokens: list[int] = []
        for _, position, token_ids, *_ in self.outputs[request_id]:
            assert position == len(tokens)
            tokens += token_ids
        return tokens

    def text(self, request_id: str) -> str:
        return "".join(output[5] or "" for output in self.outputs[request_id])
