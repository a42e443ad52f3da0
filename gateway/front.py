"""The front: the process that clients connect to, over HTTP and ZeroMQ.

Started by the supervisor as `python -m gateway.front`, outside the MPI world. It holds the journal, so that a
request outlives any world. It imports no torch, and nothing of the engine or the launcher.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import uvloop
import zmq
from starlette.types import ASGIApp

from gateway import grammars
from gateway.calls import Calls
from gateway.control import Control
from gateway.control_messages import FrontState, WorldTable, of_front
from gateway.curve import ServerKeys
from gateway.dialect import Dialect
from gateway.disk_journal import DiskJournal
from gateway.errors import EndpointError, GatewayError
from gateway.front_config import FrontConfig, parse_arguments
from gateway.http.app import make_app
from gateway.http.batches.routes import Batches
from gateway.http.openai import OpenAI
from gateway.http.operations import Operations
from gateway.http.peers import PEER_SOCKET, Peers
from gateway.http.resumable import ResumableCalls
from gateway.http.server import HttpServer, http_server
from gateway.inference.diagnostic_models import diagnostic_models
from gateway.inference.language_model import LanguageModel
from gateway.inference.repository import Repository
from gateway.journal import Journal
from gateway.journal_rows import JournalLocked
from gateway.log import Logger, configure_log
from gateway.metrics import FrontMetrics
from gateway.requests import Requests
from gateway.rpc.grpc_port import GrpcAccess, GrpcPort
from gateway.shared_counts import SharedCounts
from gateway.sockets import Socket
from gateway.supervision import Supervision, adoption_wait_s
from gateway.text import TextModel
from gateway.tokenizer_identity import tokenizer_identity
from gateway.world_claim import WorldClaim
from gateway.worlds import Worlds
from gateway.zmq_server import ZmqServer

EX_CONFIG = 78
"""No restart can help: sysexits.h."""

SHUTDOWN_S = 2
GRPC_SHUTDOWN_S = 0.5
"""For gRPC streams to read their last error; one whose client keeps it open without a request has nothing to read."""
DRAIN_CHECK_S = 0.02
CLIENT_CHECK_S = 1.0
COLLECT_AFTER = 10_000
"""New objects between two collections; Python's 700 are fewer than 64 requests have at once."""


def peer_socket(run_dir: Path, front: int) -> socket.socket:
    """Where other fronts pass requests on to this one. Raises EndpointError."""
    path = run_dir / of_front(PEER_SOCKET, front)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)  # of a front that was killed
        listener.bind(str(path))
        os.chmod(path, 0o600)
        listener.listen(2048)
    except OSError as error:
        raise EndpointError(
            f"{path}: {error}; give a shorter --run-dir, or one that can be written"
        ) from None
    return listener


class Front:
    """Everything that lives in the front's loop."""

    def __init__(self, config: FrontConfig, journal: Journal, text: TextModel, log: Logger) -> None:
        """To be made in the running loop. Raises EndpointError."""
        self._config = config
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._drain_timeout_s = config.drain_timeout_s
        self._context: zmq.Context[Socket] = zmq.Context()
        self._grpc: GrpcPort | None = None
        metrics = FrontMetrics(config.model)
        self._journal = journal
        shared = None
        if config.fronts > 1 and config.run_dir is not None:
            shared = SharedCounts(config.run_dir, config.front, config.fronts)
        self._claim = WorldClaim(config.front, config.fronts)
        self._requests = Requests(
            journal,
            text,
            metrics,
            log,
            max_wait_s=config.max_wait_s,
            max_waiting=config.max_waiting,
            max_waiting_tokens=config.max_waiting_tokens,
            shared=shared,
            claim=self._claim,
        )
        self._calls = Calls(self._requests, journal, log, grace_s=config.journal.disconnect_grace_s)
        self._zmq_server = bind_zmq(config, self._calls, text)
        self._worlds = Worlds(self._context, self._requests, log, self._serving_changed)
        self._supervision = Supervision(config.run_dir, config.http_fd, log, config.front)
        self._control = Control(
            self._context,
            config.control,
            self._state,
            self._on_table,
            self._orphaned,
            log,
            lambda: self._supervision.gone_s,
            adoption_wait_s(),
        )
        self._requests.on_resumed = self._claim.say = self._control.send_state
        self._log = log
        access = config.access
        self._keys = keys = access.key_ring(log, shared)
        self._certificates = access.certificates(log)
        resumable = ResumableCalls(self._calls, text, config.front)
        dialect = Dialect.of_model(text, config.tool_call_parser, config.reasoning_parser)
        openai = OpenAI(config.model, self._requests, text, resumable, dialect, access.max_body_bytes)
        metrics.journal = journal
        metrics.worlds = self._worlds
        self._tracer = access.tracer(config.model)
        if self._tracer is not None:
            self._requests.on_ended = self._tracer.ended
        operations = Operations(self._worlds, self._requests, metrics, self._supervision)
        language_model = LanguageModel(openai, self._calls, operations.why_not_ready)
        self._repository = Repository([language_model, *diagnostic_models()], operations.why_not_ready)
        if config.grpc is not None:
            self._grpc = GrpcPort(
                *config.grpc,
                self._repository,
                config.run_dir,
                log,
                self._control.send_state,
                GrpcAccess(keys, self._certificates, access.max_body_bytes),
            )
        # What clients store is with the first front.
        self._batches = Batches(config.run_dir if config.front == 0 else None, log, keys)
        app = make_app(
            openai, operations, self._repository, self._batches, metrics, log, config.page, access, keys
        )
        self._servers: list[tuple[HttpServer, socket.socket]] = []
        self._http_socket = socket.socket(fileno=config.http_fd)
        public: ASGIApp = app
        if config.fronts > 1 and config.run_dir is not None:
            public = Peers(app, config.front, config.fronts, config.run_dir)
            between_fronts = http_server(app, access.connections, None, log, SHUTDOWN_S)
            self._servers.append((between_fronts, peer_socket(config.run_dir, config.front)))
        server = http_server(public, access.connections, self._certificates, log, SHUTDOWN_S)
        self._servers.append((server, self._http_socket))

    async def run(self) -> None:
        """Serves until `stop`."""
        watch = asyncio.create_task(self._watch_clients())
        serving = asyncio.gather(*(server.serve(sockets=[at]) for server, at in self._servers))
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
        await self._drain()
        # Open streams end with an error that says why; then nothing holds uvicorn up.
        self._requests.close()
        await self._batches.close()
        for server, _ in self._servers:
            server.should_exit = True
        if self._grpc is not None:
            await self._grpc.stop(GRPC_SHUTDOWN_S)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(serving, SHUTDOWN_S + 1)
        watch.cancel()
        stopped.cancel()
        self._worlds.close()
        self._control.close()
        self._supervision.close()
        self._zmq_server.close()
        if self._tracer is not None:
            self._tracer.close()
        self._context.destroy(linger=0)

    async def _drain(self) -> None:
        """Takes nothing new, and waits until what runs has finished, for the drain timeout at most."""
        self._requests.drain()
        if self._grpc is not None:
            self._grpc.serving_changed()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_timeout_s):
                while self._requests.num_live and not self._stop_now.is_set():
                    await asyncio.sleep(DRAIN_CHECK_S)

    def stop(self) -> None:
        """Ends `run` when what runs has finished, or after the drain timeout."""
        self._stop.set()

    def stop_now(self) -> None:
        """Ends `run` within SHUTDOWN_S and a second."""
        self._stop_now.set()
        self._stop.set()

    def _state(self) -> FrontState:
        return FrontState(
            os.getpid(),
            self._zmq_server.endpoint,
            self._worlds.serving_epoch,
            self._requests.resumed_at,
            self._grpc.endpoint if self._grpc is not None else None,
            self._journal.moved_aside,
            self._claim.wanted,
            self._claim.out_of,
            self._requests.in_flight,
        )

    def _on_table(self, table: WorldTable) -> None:
        self._claim.note(table.claim)
        if self._tracer is not None:
            self._tracer.note_faults(table.faults)
        self._worlds.update(table)
        self._requests.note_claims()

    def _serving_changed(self) -> None:
        if self._worlds.serving_epoch is not None:
            self._zmq_server.world_up()
        if self._grpc is not None:
            self._grpc.serving_changed()
        self._control.send_state()

    def _orphaned(self) -> None:
        self._log.error("orphaned", detail="no supervisor has taken over; the front ends itself")
        if self._config.run_dir is not None:
            for path in self._config.run_dir.glob("*.sock"):  # of the supervisor that is no more
                with contextlib.suppress(OSError):
                    path.unlink()
        self.stop_now()

    async def _watch_clients(self) -> None:
        while True:
            await asyncio.sleep(CLIENT_CHECK_S)
            try:
                self._zmq_server.check_clients()
                if self._certificates is not None:
                    self._certificates.check()
                if self._keys is not None:
                    self._keys.look()
                self._journal.tick(time.time())
            except (
                Exception
            ) as error:  # whatever it is: silent clients must be found the next time, and room made
                self._log.error("clients and journal could not be checked", detail=repr(error))


def open_journal(config: FrontConfig, log: Logger) -> Journal:
    """The journal of the run folder. Raises JournalLocked if another front has it."""
    options = config.journal
    if not options.on_disk or config.run_dir is None:
        return Journal(options.retention_s)
    return DiskJournal(
        config.run_dir / of_front("journal.sqlite", config.front),
        log,
        identity=tokenizer_identity(config.model_dir / "tokenizer.json"),
        sync=options.sync,
        retention_s=options.retention_s,
        max_bytes=options.max_bytes,
    )


def bind_zmq(config: FrontConfig, calls: Calls, text: TextModel) -> ZmqServer:
    """Where a free port was asked for, the one that an earlier front of this run folder had, if it is still free:
    its clients come back to it. Raises EndpointError, CurveError."""
    curve = None if config.zmq_curve_dir is None else ServerKeys(config.zmq_curve_dir)
    memory = None if config.run_dir is None else config.run_dir / "zmq-endpoint"
    is_free_choice = config.zmq.startswith("tcp://") and config.zmq.endswith((":*", ":0"))
    if is_free_choice and memory is not None and memory.exists():
        with contextlib.suppress(EndpointError, OSError):
            earlier = memory.read_text().strip()
            if earlier.rpartition(":")[0] == config.zmq.rpartition(":")[0]:
                return ZmqServer(earlier, calls, text, config.model, curve)
    server = ZmqServer(config.zmq, calls, text, config.model, curve)
    if is_free_choice and memory is not None:
        with contextlib.suppress(OSError):  # a full disk: the next front takes another port
            memory.write_text(server.endpoint + "\n")
    return server


async def serve(config: FrontConfig, text: TextModel, log: Logger) -> None:
    """Runs a front until SIGTERM, after which it drains, or SIGINT. Raises EndpointError, JournalLocked."""
    journal = open_journal(config, log)
    front = Front(config, journal, text, log)
    # What was made by now stays for good: collections need not walk through it. Requests leave few cycles, so that
    # they come less often, too; errors may hold on to bodies of megabytes: see app.py.
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, front.stop)
    loop.add_signal_handler(signal.SIGINT, front.stop_now)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)  # sent to all of a service, it is the supervisor's
    await front.run()
    journal.close()


def _allow_many_connections() -> None:
    """Each client holds a file descriptor; the soft limit is often 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> int:
    """The process. Exit code 78 with one line on standard error where no restart can help."""
    config = parse_arguments()
    log = configure_log(config.access.log_format, config.access.log_level)
    _allow_many_connections()
    try:
        text = TextModel.from_folder(config.model_dir)
        with contextlib.closing(grammars.try_with(config.model_dir / "tokenizer.json")):
            uvloop.run(serve(config, text, log))
    except EndpointError as error:
        print(f"phalanx: error: --zmq: {error}", file=sys.stderr)
        return EX_CONFIG
    except JournalLocked as error:
        print(f"phalanx: error: {error}", file=sys.stderr)
        return 1  # the other front may be about to end
    except GatewayError as error:
        print(f"phalanx: error: {error}", file=sys.stderr)
        return EX_CONFIG
    return 0


if __name__ == "__main__":
    sys.exit(main())
