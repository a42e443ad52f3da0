"""The front's gRPC server: inference, health, reflection, on a port of its own.

Imported by grpc_port.py in a thread, since it takes a moment; runs in the front's loop.
"""

from __future__ import annotations

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gateway.inference.repository import Repository
from gateway.log import Logger
from gateway.rpc.grpc_port import GrpcAccess
from gateway.rpc.keys import KeyInterceptor
from gateway.rpc.service import SERVICE, InferenceService

_OPTIONS = [
    ("grpc.so_reuseport", 0),  # a port that somebody has is an error, not shared
    ("grpc.max_send_message_length", -1),
]


class PortTaken(Exception):
    """The port cannot be bound."""


class GrpcServer:
    """A server that listens from the moment on that `start` returns."""

    def __init__(self, repository: Repository, log: Logger, access: GrpcAccess) -> None:
        """To be made in the running loop."""
        self._repository = repository
        self._health = health.aio.HealthServicer()
        self._certificates = access.certificates
        options = [*_OPTIONS, ("grpc.max_receive_message_length", access.max_message_bytes)]
        interceptors = [KeyInterceptor(access.keys)] if access.keys is not None else []
        self._server = grpc.aio.server(interceptors=interceptors, options=options)
        self._server.add_generic_rpc_handlers((InferenceService(repository, log).handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self, host: str, port: int) -> int:
        """Returns the port. Raises PortTaken, after which this server is of no use."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._certificates is None:
                bound = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(address, self._certificates.grpc_credentials(grpc))
        except RuntimeError as error:
            raise PortTaken(str(error)) from None
        if bound == 0:
            raise PortTaken(address)
        await self.note_ready()
        await self._server.start()
        return bound

    async def note_ready(self) -> None:
        """To be called when the server becomes ready or ceases to be: those who watch its health hear of it."""
        status = health_pb2.HealthCheckResponse.SERVING
        if not self._repository.is_ready:
            status = health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", SERVICE):
            await self._health.set(service, status)

    async def stop(self, grace_s: float) -> None:
        """Takes nothing new; what still runs after `grace_s` is cancelled."""
        await self._server.stop(grace_s)
