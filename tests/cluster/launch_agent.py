"""What mpirun calls instead of ssh: `launch_agent HOST COMMAND...`. Goes over the network, so that a host that is cut
off cannot be reached."""

from __future__ import annotations

import itertools
import json
import socket
import sys

CONNECT_TIMEOUT_S = 2.0
PORT = 2222


def main(host: str, command: str) -> int:
    link = socket.create_connection((host, PORT), CONNECT_TIMEOUT_S)
    link.settimeout(None)
    link.sendall(json.dumps(command).encode() + b"\n")
    with link.makefile("rb") as lines:
        for line in lines:
            if line.startswith(b"\0"):
                return int(line[1:])
            sys.stdout.buffer.write(line)
            sys.stdout.flush()
    return 255


if __name__ == "__main__":
    # Hydra gives it options of ssh as well, all of them without a value.
    name, *words = itertools.dropwhile(lambda word: word.startswith("-"), sys.argv[1:])
    sys.exit(main(name, " ".join(words)))
