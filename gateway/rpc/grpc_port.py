"""The gRPC server's life in the front: imported and bound beside everything else, so that nothing waits for it.

Made by front.py. It imports no gRPC itself, and a front without it works.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.inference.repository import Repository
from gateway.keys import KeyRing
from gateway.log import Logger
from gateway.tls import Certificates

if TYPE_CHECKING:
    from gateway.rpc.server import GrpcServer

MEMORY = "grpc-endpoint"
"""In the run folder: where a free port was asked for, the one that it got."""
RETRY_S = 1.0


@dataclass(frozen=True)
class GrpcAccess:
    """Who may ask, over what, and how much at once."""

    keys: KeyRing | None = None
    certificates: Certificates | None = None
    max_message_bytes: int = 16 * 1024 * 1024


class GrpcPort:
    """Tries to get the port until it has it: the supervisor has seen that it was free, so that whoever has it now
    goes soon, or is a surprise that the log tells of."""

    def __init__(
        self,
        host: str,
        port: int,
        repository: Repository,
        run_dir: Path | None,
        log: Logger,
        on_bound: Callable[[], None],
        access: GrpcAccess | None = None,
    ) -> None:
        """To be made in the running loop. `port` 0: any free one, the same again for the next front."""
        self.endpoint: str | None = None
        """Where clients connect; None as long as nobody can."""
        self._host = host
        self._port = port
        self._repository = repository
        self._memory = run_dir / MEMORY if run_dir is not None and port == 0 else None
        self._log = log
        self._on_bound = on_bound
        self._access = access or GrpcAccess()
        self._server: GrpcServer | None = None
        self._changes: set[asyncio.Task[None]] = set()
        self._starting = asyncio.create_task(self._start())

    def serving_changed(self) -> None:
        """To be called when the server becomes ready or ceases to be."""
        if self._server is not None:
            task = asyncio.create_task(self._server.note_ready())
            self._changes.add(task)
            task.add_done_callback(self._changes.discard)

    async def stop(self, grace_s: float) -> None:
        """Ends it; what still runs after `grace_s` is cancelled."""
        self._starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._starting
        if self._server is not None:
            await self._server.stop(grace_s)

    # ----------------------------------------------------------------------- inside

    async def _start(self) -> None:
        # The front starts processes, and none of them uses gRPC behind a fork.
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
        try:
            module = await asyncio.to_thread(importlib.import_module, "gateway.rpc.server")
        except ImportError as error:
            self._log.error(
                "no gRPC", detail=f"{error}; install grpcio, grpcio-health-checking and -reflection"
            )
            return
        wanted = [self._port]
        if (earlier := self._earlier_port()) is not None:
            wanted.insert(0, earlier)
        warned = False
        while True:
            for port in wanted:
                server: GrpcServer = module.GrpcServer(self._repository, self._log, self._access)
                try:
                    bound = await server.start(self._host, port)
                except module.PortTaken:
                    await server.stop(0)
                    continue
                self._bound(server, bound)
                return
            if not warned:
                warned = True
                detail = f"port {self._port} is in use, tried again every {RETRY_S:g} s"
                self._log.warning("no gRPC yet", detail=detail)
            await asyncio.sleep(RETRY_S)

    def _earlier_port(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            if self._memory is not None:
                return int(self._memory.read_text())
        return None

    def _bound(self, server: GrpcServer, port: int) -> None:
        self._server = server
        self.endpoint = f"[{self._host}]:{port}" if ":" in self._host else f"{self._host}:{port}"
        if self._memory is not None:
            with contextlib.suppress(OSError):  # a full disk: the next front takes another port
                self._memory.write_text(f"{port}\n")
        self._on_bound()
