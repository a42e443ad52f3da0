"""What the supervisor tells the front: its command line, as one frozen value. Read once, by front.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gateway.access import Access
from gateway.admission import MAX_WAITING, MAX_WAITING_TOKENS
from gateway.calls import GRACE_S
from gateway.disk_journal import MAX_BYTES
from gateway.journal import RETENTION_S


@dataclass(frozen=True)
class JournalConfig:
    """What is kept, and for how long."""

    on_disk: bool = False
    sync: bool = False
    retention_s: float = RETENTION_S
    max_bytes: int = MAX_BYTES
    disconnect_grace_s: float = GRACE_S


@dataclass(frozen=True)
class FrontConfig:
    """What the supervisor tells the front."""

    model_dir: Path
    model: str
    http_fd: int
    zmq: str
    control: str
    run_dir: Path | None
    max_wait_s: float
    max_waiting: int
    max_waiting_tokens: int
    journal: JournalConfig
    drain_timeout_s: float = 0.0
    grpc: tuple[str, int] | None = None
    """Address and port for gRPC; None for none."""
    page: bool = True
    """Whether there is a page at `/`."""
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    access: Access = field(default_factory=Access)
    zmq_curve_dir: Path | None = None
    """Keys of the ZeroMQ server and of its clients; None: connections are plain."""
    front: int = 0
    fronts: int = 1
    """Which one this is, from 0 on, of how many on the port."""


def parse_arguments(arguments: Sequence[str] | None = None) -> FrontConfig:
    parser = argparse.ArgumentParser(prog="python -m gateway.front", description="The front of a deployment.")
    parser.add_argument("--model-dir", type=Path, required=True, help="folder with the tokenizer's files")
    parser.add_argument("--served-model-name", required=True, help="the model's name for clients")
    parser.add_argument("--http-fd", type=int, required=True, help="inherited listening socket")
    parser.add_argument("--zmq", required=True, help="endpoint for ZeroMQ clients, tcp://127.0.0.1:5555")
    parser.add_argument("--zmq-curve-dir", type=Path, help="folder of CURVE keys")
    parser.add_argument("--grpc", type=_address, metavar="HOST:PORT", help="where gRPC listens; port 0: any")
    parser.add_argument("--control", required=True, help="the supervisor's control socket, ipc://...")
    parser.add_argument("--run-dir", type=Path, help="run folder of the deployment")
    parser.add_argument("--front", type=int, default=0, help="which of the fronts this is, from 0 on")
    parser.add_argument("--fronts", type=int, default=1, help="how many fronts there are")
    parser.add_argument(
        "--max-wait-s", type=float, default=60.0, help="how long a new request waits for a world"
    )
    parser.add_argument(
        "--max-waiting",
        type=int,
        default=MAX_WAITING,
        help="how many requests may wait for their first token",
    )
    parser.add_argument(
        "--max-waiting-tokens",
        type=int,
        default=MAX_WAITING_TOKENS,
        help="how many tokens the prompts of those may have together",
    )
    parser.add_argument(
        "--drain-timeout-s", type=float, default=0.0, help="how long SIGTERM lets running requests finish"
    )
    parser.add_argument("--tool-call-parser", default="auto", help="see phalanx serve --help")
    parser.add_argument("--reasoning-parser", default="auto", help="see phalanx serve --help")
    parser.add_argument("--journal", choices=("off", "disk"), default="disk", help="see phalanx serve --help")
    parser.add_argument("--journal-sync", action="store_true")
    parser.add_argument("--journal-retention-s", type=float, default=RETENTION_S)
    parser.add_argument("--journal-max-bytes", type=int, default=MAX_BYTES)
    parser.add_argument("--disconnect-grace-s", type=float, default=GRACE_S)
    parser.add_argument("--no-page", dest="page", action="store_false", help="nothing at /")
    Access.add_arguments(parser)
    options = parser.parse_args(arguments)
    return FrontConfig(
        model_dir=options.model_dir,
        model=options.served_model_name,
        http_fd=options.http_fd,
        zmq=options.zmq,
        zmq_curve_dir=options.zmq_curve_dir,
        grpc=options.grpc,
        control=options.control,
        run_dir=options.run_dir,
        page=options.page,
        front=options.front,
        fronts=options.fronts,
        max_wait_s=options.max_wait_s,
        max_waiting=options.max_waiting,
        max_waiting_tokens=options.max_waiting_tokens,
        drain_timeout_s=options.drain_timeout_s,
        tool_call_parser=options.tool_call_parser,
        reasoning_parser=options.reasoning_parser,
        access=Access.from_arguments(options),
        journal=JournalConfig(
            on_disk=options.journal == "disk",
            sync=options.journal_sync,
            retention_s=options.journal_retention_s,
            max_bytes=options.journal_max_bytes,
            disconnect_grace_s=options.disconnect_grace_s,
        ),
    )


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)
