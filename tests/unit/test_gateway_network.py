"""Client when the network between it and a real front is gone for seconds, or for good: nothing is lost or repeated,
and no wait is without end. The network is a relay in this process that stops carrying."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from gateway.client import Client, ConnectionLost, SamplingParams
from tests.echo_world import EchoCluster, echo_tokens

pytestmark = pytest.mark.slow
PROMPT = list(range(10, 33))


class Relay:
    """Carries bytes between clients and a server. `cut` is a network that drops packets: connections stay open and
    silent. `hang_up` ends them."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._carries = threading.Event()
        self._carries.set()
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._carries.clear()

    def mend(self) -> None:
        self._carries.set()

    def hang_up(self) -> None:
        sockets, self._sockets = self._sockets, []
        for one in sockets:
            shut_down(one)

    def close(self) -> None:
        self.mend()
        self._listener.close()
        self.hang_up()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
            except OSError:
                return
            self._sockets += [client, server]
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self._carries.wait()
                sink.sendall(data)
        except OSError:
            pass
        for one in (source, sink):
            shut_down(one)


def shut_down(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    options = ("--disconnect-grace-s", "60")
    with EchoCluster(tmp_path_factory.mktemp("echo"), front_options=options) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


@pytest.fixture
def relay(cluster: EchoCluster) -> Iterator[Relay]:
    relay = Relay(cluster.zmq)
    yield relay
    relay.close()


@pytest.mark.parametrize("how", ["cut", "hang_up"])
def test_streams_go_on_when_the_network_is_back(relay: Relay, how: str) -> None:
    # Both ends find out after the same silence; the client here a little sooner.
    with Client(relay.endpoint, silence_s=1.0, connect_timeout_s=3.0) as client:
        streams = [client.submit(PROMPT, SamplingParams(max_tokens=400, seed=5)) for _ in range(4)]
        brought = [list(next(stream).token_ids) for stream in streams]
        if how == "cut":
            relay.cut()
            threading.Timer(5.0, relay.mend).start()
        else:
            relay.hang_up()
        for stream, tokens in zip(streams, brought, strict=True):
            assert tokens + stream.collect().token_ids == echo_tokens(PROMPT, 400)


def test_a_network_that_stays_away_ends_in_a_clear_error(relay: Relay) -> None:
    with Client(relay.endpoint, silence_s=1.0, connect_timeout_s=2.0, reconnect_s=2.0) as client:
        stream = client.submit(PROMPT, SamplingParams(max_tokens=4000))
        next(stream)
        relay.cut()
        began = time.monotonic()
        with pytest.raises(ConnectionLost, match=r"did not come back within 2 s; call connect\(\)"):
            stream.collect()
        assert time.monotonic() - began < 30
