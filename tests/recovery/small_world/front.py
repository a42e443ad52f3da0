"""A front that says it serves every world that is active, and writes down the table that it was sent."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import msgspec
import zmq

from gateway.protocol import FrontState, WorldTable, decode_control_message, encode
from launcher.watch import EXIT_CONFIG


def main(control: str, folder: Path) -> None:
    behaviour = os.environ.get("SMALL_WORLD", "")
    if behaviour == "front config":
        print("phalanx: error: --zmq tcp://x: is taken", file=sys.stderr)
        sys.exit(EXIT_CONFIG)
    if behaviour == "front crash":
        sys.exit(3)
    if behaviour == "front ignores SIGTERM":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    link = zmq.Context().socket(zmq.DEALER)
    link.connect(control)
    serving = None
    link.send(encode(FrontState(os.getpid(), "tcp://127.0.0.1:2", serving)))
    while True:
        table = decode_control_message(link.recv())
        assert isinstance(table, WorldTable)
        temporary = folder / "table.new"
        temporary.write_text(json.dumps(msgspec.to_builtins(table)))
        temporary.rename(folder / "table.json")
        active = next((world.epoch for world in table.worlds if world.state == "active"), None)
        if active != serving:
            serving = active
            link.send(encode(FrontState(os.getpid(), "tcp://127.0.0.1:2", serving)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
