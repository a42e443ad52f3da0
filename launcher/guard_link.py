"""The supervisor's end of the links to its guards: one ROUTER with CURVE, and the check of the clients' keys.
Used by the supervisor alone; must never block, and never let a stranger give or hear a kill order."""

from __future__ import annotations

from collections.abc import Iterator

import zmq
from zmq.utils import z85

from launcher.watch import MAX_MESSAGE_BYTES, Message, MessageError, from_bytes

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_MAX_MESSAGES_A_TURN = 1000


class GuardLink:
    """Keys made for this run, a ROUTER on loopback, and ZeroMQ's authentication protocol (ZAP, RFC 27)."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str = "127.0.0.1") -> None:
        server_public, server_secret = zmq.curve_keypair()
        client_public, client_secret = zmq.curve_keypair()
        self.server_key = server_public.decode()
        self.public_key = client_public.decode()
        self.secret_key = client_secret.decode()
        self._client_key = z85.decode(client_public)

        self.zap = context.socket(zmq.REP)
        self.zap.linger = 0
        self.zap.bind(_ZAP_ENDPOINT)

        self.router = context.socket(zmq.ROUTER)
        self.router.curve_server = True
        self.router.curve_secretkey = server_secret
        self.router.zap_domain = b"guards"
        self.router.linger = 0
        self.router.maxmsgsize = MAX_MESSAGE_BYTES
        self.router.router_mandatory = True
        self.router.bind(f"tcp://{address}:*")
        self.endpoint = self.router.getsockopt_string(zmq.LAST_ENDPOINT)

    def close(self) -> None:
        self.router.close()
        self.zap.close()

    def answer_zap(self) -> None:
        """Lets the holder of the run's client key in, and nobody else (RFC 27)."""
        while True:
            try:
                frames = self.zap.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            version, request_id = (*frames, b"", b"")[:2]
            allowed = (
                len(frames) == 7
                and version == b"1.0"
                and frames[2] == b"guards"
                and frames[5] == b"CURVE"
                and frames[6] == self._client_key
            )
            code, text, user = (b"200", b"OK", b"guard") if allowed else (b"400", b"unknown key", b"")
            self.zap.send_multipart([b"1.0", request_id, code, text, user, b""])

    def receive(self) -> Iterator[tuple[bytes, Message]]:
        """What has come in, as (guard's identity, message), without waiting; frames that are no message are
        dropped."""
        for _ in range(_MAX_MESSAGES_A_TURN):
            try:
                identity, *frames = self.router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 1:
                continue
            try:
                yield identity, from_bytes(frames[0])
            except MessageError:
                continue

    def send(self, identity: bytes, message: Message) -> bool:
        """Sends to one guard without waiting; False if it is not there any more."""
        try:
            self.router.send_multipart([identity, message.to_bytes()], zmq.NOBLOCK)
        except zmq.ZMQError:  # EHOSTUNREACH of a guard that is gone, EAGAIN of one that reads nothing
            return False
        return True
