"""Process 1 of a "host" of the tests (see namespaces): starts what the launch agent asks for over the network, as an
sshd would. `host_agent NAME`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

PORT = 2222
TEMPORARY = "/mnt"
"""A host has its own: MPI's daemons name their folders by their pids, which are the same small numbers on each host
of each test, and what a killed one left behind would stop the next."""
ended: dict[int, int] = {}
"""How children have ended, by pid."""


def run(link: socket.socket) -> None:
    """One command: its output back to the asker, then its exit code after a zero byte."""
    with link, link.makefile("r") as lines:
        asked = lines.readline()
        if not asked:  # somebody only looked whether this host is there
            return
        command = json.loads(asked)
        process = subprocess.Popen(
            ["sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "TMPDIR": TEMPORARY},
        )
        assert process.stdout is not None
        for line in process.stdout:
            link.sendall(line)
        while process.pid not in ended:
            time.sleep(0.01)
        link.sendall(b"\0%d\n" % os.waitstatus_to_exitcode(ended.pop(process.pid)))


def reap() -> None:
    """Process 1 takes every orphan of its host off the process table."""
    while True:
        try:
            pid, status = os.wait()
            ended[pid] = status
        except ChildProcessError:
            time.sleep(0.01)


def main(name: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for folder in ("/dev/shm", TEMPORARY):
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    socket.sethostname(name)
    threading.Thread(target=reap, daemon=True).start()
    server = socket.create_server(("0.0.0.0", PORT))
    print("up", flush=True)
    while True:
        link, _ = server.accept()
        threading.Thread(target=run, args=(link,), daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1])
