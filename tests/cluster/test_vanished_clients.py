"""A client whose host vanishes without a word: the server's end of its connection does not stay for ever."""

from __future__ import annotations

import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gateway import router
from tests.cluster.namespaces import cluster, why_not

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

CLIENT = """
import sys, time, zmq
from gateway.protocol import Hello, encode
socket = zmq.Context().socket(zmq.DEALER)
socket.connect(sys.argv[1])
socket.send(encode(Hello(min_version=99, max_version=99)))
print("refused" if b"bad_message" in socket.recv() else "?", flush=True)
time.sleep(600)
"""


def connections(pid: int, port: int) -> list[int]:
    """Of the established ones of that port, on the network of a process, the bytes that were not acknowledged."""
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    found = [row for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "01"]
    return [int(row[4].partition(":")[0], 16) for row in found]


def test_the_connection_of_a_vanished_host_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "KEEPALIVE_IDLE_S", 1)
    monkeypatch.setattr(router, "KEEPALIVE_INTERVAL_S", 1)
    with cluster(2, tmp_path) as hosts:
        with hosts.entered():
            server = router.Router("tcp://10.77.1.2:*", lambda: None, epoch=0)
        port = int(server.endpoint.rpartition(":")[2])
        command = ["nsenter", "--net", "--target", str(hosts.pid(2)), "--", sys.executable, "-c", CLIENT]
        client = subprocess.Popen([*command, server.endpoint], stdout=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + 60
            assert client.stdout is not None
            while not select.select([client.stdout], [], [], 0.01)[0]:
                server.drain()
                assert time.monotonic() < deadline
            assert client.stdout.readline() == "refused\n"
            while connections(hosts.first_pid, port) != [0]:  # else the kernel repeats, and does not ask
                assert time.monotonic() < deadline
                time.sleep(0.01)
            hosts.cut(2)
            while connections(hosts.first_pid, port):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert client.poll() is None  # it has not said goodbye
        finally:
            client.kill()
            client.wait()
            server.close()
