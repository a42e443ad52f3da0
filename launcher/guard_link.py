"""The supervisor's end of the links to its guards: one ROUTER with CURVE, and the check of the clients' keys.
Used by the supervisor alone; must never block, and never let a stranger give or hear a kill order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from launcher.guard_environment import GuardEnvironment
from launcher.guard_messages import MAX_MESSAGE_BYTES, Introduce, Message, MessageError, from_bytes
from launcher.processes import ProcessId, host_id

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_MAX_MESSAGES_A_TURN = 1000


@dataclass(frozen=True)
class LinkKeys:
    """The CURVE keys of one run, in Z85: the supervisor's pair, and the one that all its guards share."""

    server_public: str
    server_secret: str = field(repr=False)
    client_public: str
    client_secret: str = field(repr=False)

    @classmethod
    def make(cls) -> LinkKeys:
        return cls(*(key.decode() for pair in (zmq.curve_keypair(), zmq.curve_keypair()) for key in pair))


class GuardLink:
    """Keys made for this run, a ROUTER, and ZeroMQ's authentication protocol (ZAP, RFC 27)."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        supervisor: ProcessId,
        endpoint: str = "tcp://127.0.0.1:*",
        keys: LinkKeys | None = None,
        remote_endpoint: str = "",
    ) -> None:
        """`keys`: those of the run that is taken over. `remote_endpoint`: for the guards of other hosts, if there
        are any. Raises zmq.ZMQError if an endpoint is not to be had."""
        self._supervisor = supervisor
        self.keys = keys = keys or LinkKeys.make()
        self._client_key = z85.decode(keys.client_public.encode())

        self.zap = context.socket(zmq.REP)
        self.zap.linger = 0
        self.zap.bind(_ZAP_ENDPOINT)

        self.router = context.socket(zmq.ROUTER)
        self.router.curve_server = True
        self.router.curve_secretkey = keys.server_secret.encode()
        self.router.zap_domain = b"guards"
        self.router.linger = 0
        self.router.maxmsgsize = MAX_MESSAGE_BYTES
        self.router.router_mandatory = True
        self.router.bind(endpoint)
        self.endpoint = self.router.getsockopt_string(zmq.LAST_ENDPOINT)
        self.remote_endpoint = remote_endpoint
        if remote_endpoint:
            self.router.bind(remote_endpoint)
            self.remote_endpoint = self.router.getsockopt_string(zmq.LAST_ENDPOINT)

    def guard_environment(self, world_dir: Path, shm_dir: Path, adoption_wait_s: float) -> GuardEnvironment:
        """What the guards of a world have to know to report here."""
        return GuardEnvironment(
            endpoint=self.endpoint,
            remote_endpoint=self.remote_endpoint,
            server_key=self.keys.server_public,
            public_key=self.keys.client_public,
            secret_key=self.keys.client_secret,
            supervisor=self._supervisor,
            supervisor_host_id=host_id(),
            world_dir=world_dir,
            shm_dir=shm_dir,
            adoption_wait_s=adoption_wait_s,
        )

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

    def introduce(self, identity: bytes, epoch: int) -> None:
        """Asks a guard for its hello, and tells it whom it says it to."""
        self.send(identity, Introduce(epoch, self._supervisor.pid, self._supervisor.start, host_id()))

    def send(self, identity: bytes, message: Message) -> bool:
        """Sends to one guard without waiting; False if it is not there any more."""
        try:
            self.router.send_multipart([identity, message.to_bytes()], zmq.NOBLOCK)
        except zmq.ZMQError:  # EHOSTUNREACH of a guard that is gone, EAGAIN of one that reads nothing
            return False
        return True
