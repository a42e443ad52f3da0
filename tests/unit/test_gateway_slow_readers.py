"""Many ZeroMQ clients that grant credit for a few tokens and then do not read: what the front keeps for them is
bounded, however many there were before."""

from __future__ import annotations

from pathlib import Path

import msgpack
import psutil
import pytest
import zmq

from gateway.client import Client, SamplingParams
from tests.echo_world import EchoCluster, echo_tokens

pytestmark = pytest.mark.slow
WAVES = 6
CLIENTS = 20
REQUESTS = 3
TOKENS = 500
LOGPROBS = 20
GROWTH_BYTES = 64 * 2**20
"""From the second wave to the last one. Each brings 37 MiB that nobody reads."""


def done(cluster: EchoCluster) -> int:
    """Requests that have ended with all their tokens."""
    lines = cluster.get("/metrics")[1].decode().splitlines()
    [line] = [
        line for line in lines if line.startswith("phalanx_requests_finished_total") and '"length"' in line
    ]
    return int(float(line.split()[-1]))


def wave(cluster: EchoCluster, context: zmq.Context[zmq.Socket[bytes]]) -> list[zmq.Socket[bytes]]:
    """Clients that have got their credit's worth, and stay."""
    before, dealers = done(cluster), []
    params = {"max_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True, "logprobs": LOGPROBS}
    for _ in range(CLIENTS):
        dealer = context.socket(zmq.DEALER, socket_class=zmq.Socket)
        dealer.linger = 0
        dealer.connect(cluster.zmq)
        dealer.send(msgpack.packb({"type": "hello", "min_version": 1, "max_version": 1}))
        for number in range(REQUESTS):
            asked = {
                "type": "submit",
                "request_id": str(number),
                "prompt_token_ids": [5, 6, 7],
                "params": params,
            }
            dealer.send(msgpack.packb({**asked, "credit": 4}))
        dealers.append(dealer)
    cluster.wait(lambda: done(cluster) == before + CLIENTS * REQUESTS, 60)
    return dealers


def test_clients_that_do_not_read(tmp_path: Path) -> None:
    with EchoCluster(tmp_path, step_s=0.0) as cluster:
        cluster.wait_serving(cluster.start_world())
        front = psutil.Process(cluster.front.pid)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            sizes, dealers = [], []
            for _ in range(WAVES):
                dealers += wave(cluster, context)
                for dealer in dealers:  # they are there, and read nothing
                    dealer.send(msgpack.packb({"type": "ping", "sent_at": 1.0}))
                sizes.append(front.memory_info().rss)
            print("MiB after each wave:", [size >> 20 for size in sizes])
            assert max(sizes[2:]) - sizes[1] < GROWTH_BYTES, sizes
            with Client(cluster.zmq) as client:  # who reads is served as ever
                prompt = [10, 11, 12]
                result = client.generate(prompt, SamplingParams(max_tokens=9))
                assert result.token_ids == echo_tokens(prompt, 9)
        finally:
            context.destroy(linger=0)
