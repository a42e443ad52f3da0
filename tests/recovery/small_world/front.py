"""A front that says it serves every world that is active, and writes down the table that it was sent."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import msgspec
import zmq

from gateway.control_messages import FrontState, WorldTable, decode_control_message, encode_control_message
from launcher.leases import adoption_wait_s
from launcher.watch import EXIT_CONFIG


def hand_over(folder: Path, listener: int) -> None:
    """Gives the listening socket to every supervisor that asks."""
    path = folder / "listen.sock"
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(path))
    server.listen()
    while True:
        link, _ = server.accept()
        with link:
            socket.send_fds(link, [b"l"], [listener])


def main(control: str, folder: Path, listener: int) -> None:
    behaviour = os.environ.get("SMALL_WORLD", "")
    if behaviour == "front config":
        print("phalanx: error: --zmq tcp://x: is taken", file=sys.stderr)
        sys.exit(EXIT_CONFIG)
    if behaviour == "front crash":
        sys.exit(3)
    if behaviour == "front ignores SIGTERM":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    link = zmq.Context().socket(zmq.DEALER)
    link.linger = 0
    link.connect(control)
    serving = None
    threading.Thread(target=hand_over, args=(folder, listener), daemon=True).start()
    wait_s = adoption_wait_s()
    told_at = time.monotonic()
    while time.monotonic() - told_at < wait_s:
        link.send(encode_control_message(FrontState(os.getpid(), "tcp://127.0.0.1:2", serving)))
        if not link.poll(1000):
            continue
        told_at = time.monotonic()
        table = decode_control_message(link.recv())
        assert isinstance(table, WorldTable)
        temporary = folder / "table.new"
        with contextlib.suppress(OSError):  # a full disk
            temporary.write_text(json.dumps(msgspec.to_builtins(table)))
            temporary.rename(folder / "table.json")
        serving = max((world.epoch for world in table.worlds if world.state == "active"), default=None)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
