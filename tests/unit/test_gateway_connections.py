"""What a connection may do: slow heads, slow bodies, large heads, too many of them, and clients that do not read.
Real sockets, and bytes that no client library would send."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import openai
import pytest
from openai import DefaultHttpxClient

from tests.echo_world import EchoCluster
from tests.unit.http_asking import TEXT, ask, events

pytestmark = pytest.mark.slow

READ_TIMEOUT_S = 1.0
SLOW_CLIENT_S = 1.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    options = ("--read-timeout-s", str(READ_TIMEOUT_S), "--slow-client-s", str(SLOW_CLIENT_S))
    options += ("--max-connections", "20", "--max-body-bytes", "5000", "--disconnect-grace-s", "0")
    world = ("--max-model-len", "30000", "--kv-cache-tokens", "60000")
    folder = tmp_path_factory.mktemp("run")
    with EchoCluster(folder, step_s=0.0002, front_options=options, world_options=world) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


def connect(cluster: EchoCluster) -> socket.socket:
    return socket.create_connection(("127.0.0.1", cluster.port), timeout=20)


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def post_head(length: int, *more: bytes) -> bytes:
    lines = [b"POST /v1/completions HTTP/1.1", b"host: x", b"content-length: %d" % length, *more]
    return b"\r\n".join(lines) + b"\r\n\r\n"


@pytest.mark.parametrize("drip", [b"GET /health HTTP/1.1\r\n", b"x-a: b\r\n"])
def test_a_head_that_drips(cluster: EchoCluster, drip: bytes) -> None:
    with connect(cluster) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        began = time.monotonic()
        connection.settimeout(0.05)
        answer = b""
        while time.monotonic() < began + 20 and not answer:
            try:
                connection.sendall(b"x-drip: 1\r\n")
                answer = connection.recv(65536)
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408 ") and b"connection: close" in answer


@pytest.mark.parametrize("first", [b"", b"\r\n", b"\r\n" * 50])
def test_a_connection_that_asks_nothing(cluster: EchoCluster, first: bytes) -> None:
    with connect(cluster) as connection:
        connection.sendall(first)
        assert read_all(connection) == b"" or first


def test_a_second_head_that_does_not_come_whole(cluster: EchoCluster) -> None:
    with connect(cluster) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /hea")
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_does_not_come(cluster: EchoCluster) -> None:
    with connect(cluster) as connection:
        connection.sendall(post_head(100) + b'{"prompt"')
        assert b"408" in read_all(connection)


def test_a_body_at_a_slow_but_fair_pace(cluster: EchoCluster) -> None:
    body = json.dumps({"prompt": "ab", "max_tokens": 2, "user": "x" * 4500}).encode()
    with connect(cluster) as connection:
        connection.sendall(post_head(len(body), b"connection: close"))
        for first in range(0, len(body), 300):  # 1.6 s in all, longer than a body without pace would have
            connection.sendall(body[first : first + 300])
            time.sleep(0.1)
        assert read_all(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nhost: x\r\nx-long: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"x-many: 1\r\n" * 200 + b"\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nx-endless: " + b"a" * 200_000,
    ],
    ids=["long", "many", "path", "endless"],
)
def test_heads_that_are_too_large(cluster: EchoCluster, head: bytes) -> None:
    with connect(cluster) as connection:
        connection.sendall(head)
        answer = b""
        try:
            answer = read_all(connection)
        except ConnectionResetError:
            assert head[-1:] != b"\n"  # what it still sent met a closed door
        # The parser refuses a path of 64 KiB itself.
        assert not answer or answer.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))


def test_bodies_that_are_too_large(cluster: EchoCluster) -> None:
    status, _, answer = ask(cluster, TEXT, {"prompt": "a" * 6000, "max_tokens": 1})
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    with connect(cluster) as connection:
        connection.sendall(post_head(10**12))
        connection.settimeout(20)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_too_many_connections(cluster: EchoCluster) -> None:
    many = [connect(cluster) for _ in range(20)]
    try:
        with connect(cluster) as one_more:
            answer = read_all(one_more)
            assert answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in answer
    finally:
        for connection in many:
            connection.close()
    cluster.wait(lambda: ask(cluster, "/health", method="GET")[0] == 200)


def test_a_client_that_does_not_read(cluster: EchoCluster) -> None:
    """It is ended; its request goes on to its end, and its stream can be taken up behind what was read."""
    # More than the sockets' buffers take, in little time: every event has the alternatives of its token.
    body = {"prompt": "abcdefgh", "max_tokens": 12_000, "logprobs": 5, "stream": True, "ignore_eos": True}
    data = json.dumps(body).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", cluster.port))
        connection.sendall(post_head(len(data), b"accept: text/event-stream") + data)
        first = connection.recv(2000)
        while b"\n\n" not in first.partition(b"\r\n\r\n")[2]:
            first += connection.recv(2000)
        head, _, rest = first.partition(b"\r\n\r\n")
        call_id = next(
            line.split(b": ")[1].decode()
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"x-phalanx-request-id")
        )
        path = f"/v1/requests/{call_id}"
        cluster.wait(lambda: "connection ended" in cluster.front_log.read_text(), 60)
        cluster.wait(lambda: ask(cluster, path, method="GET")[2]["status"] != "running", timeout_s=60)
        answer = ask(cluster, path, method="GET")[2]
        assert answer["status"] == "completed"
        assert answer["choices"][0]["completion_tokens"] == 12_000
    event_id = rest[rest.index(b"id: ") + 4 :].split(b"\n")[0].decode()
    status, _, stream = ask(cluster, f"{path}/stream", method="GET", headers={"last-event-id": event_id})
    assert status == 200 and stream.endswith(b"data: [DONE]\n\n")
    text = "".join(event["choices"][0]["text"] for event in events(stream))
    assert text == ("abcdefgh" * 1500)[int(event_id) :]


# --------------------------------------------------------------------------- TLS


def certificate(folder: Path, name: str, ca: str | None = None) -> None:
    """NAME.pem and NAME.key for 127.0.0.1, signed by CA.pem, or by itself."""

    def run(*command: str) -> None:
        subprocess.run(["openssl", *command], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key")
    if ca is None:
        run("req", "-x509", *key, "-out", f"{name}.pem", "-days", "2", "-subj", f"/CN={name}")
        return
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    run("req", *key, "-out", f"{name}.csr", "-subj", f"/CN={name}")
    signing = ("-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial", "-extfile", "names")
    run("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", "-days", "2", *signing)


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    folder = tmp_path_factory.mktemp("tls")
    certificate(folder, "ca")
    certificate(folder, "other")
    for name in ("server", "client"):
        certificate(folder, name, "ca")
    options = ("--ssl-certfile", str(folder / "server.pem"), "--ssl-keyfile", str(folder / "server.key"))
    options += ("--ssl-ca-certs", str(folder / "ca.pem"), "--grpc", "127.0.0.1:0")
    with EchoCluster(folder, step_s=0.001, front_options=options) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


def client_of(cluster: EchoCluster, *, ca: str = "ca", shows: str | None = "client") -> openai.OpenAI:
    import ssl

    context = ssl.create_default_context(cafile=str(cluster.run_dir / f"{ca}.pem"))
    if shows is not None:
        context.load_cert_chain(cluster.run_dir / f"{shows}.pem", cluster.run_dir / f"{shows}.key")
    http_client = DefaultHttpxClient(verify=context)
    url = f"https://127.0.0.1:{cluster.port}/v1"
    return openai.OpenAI(base_url=url, api_key="x", max_retries=0, timeout=20, http_client=http_client)


def test_openai_s_client_over_https(secure: EchoCluster) -> None:
    client = client_of(secure)
    chunks = client.completions.create(model="echo", prompt="abcd", max_tokens=10, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abcdabcdab"


def test_strangers_over_https(secure: EchoCluster) -> None:
    for stranger in (
        client_of(secure, ca="other"),
        client_of(secure, shows=None),
        client_of(secure, shows="other"),
    ):
        with pytest.raises(openai.APIConnectionError):
            stranger.models.list()
    with pytest.raises((http.client.HTTPException, OSError)):
        ask(secure, "/health", method="GET")  # without TLS
    assert client_of(secure).models.list().data


def test_grpc_over_tls(secure: EchoCluster) -> None:
    def part(name: str) -> bytes:
        return (secure.run_dir / name).read_bytes()

    good = grpc.ssl_channel_credentials(part("ca.pem"), part("client.key"), part("client.pem"))
    bare = grpc.ssl_channel_credentials(part("ca.pem"))
    with grpc.secure_channel(secure.grpc, good) as channel:
        grpc.channel_ready_future(channel).result(timeout=20)
    with grpc.secure_channel(secure.grpc, bare) as channel, pytest.raises(grpc.FutureTimeoutError):
        grpc.channel_ready_future(channel).result(timeout=1)


def serial(cluster: EchoCluster, port: int | None = None) -> bytes:
    """The certificate that a new connection is shown, at the HTTP port if no other is named."""
    import ssl

    context = ssl.create_default_context(cafile=str(cluster.run_dir / "ca.pem"))
    context.load_cert_chain(cluster.run_dir / "client.pem", cluster.run_dir / "client.key")
    if port is not None:
        context.set_alpn_protocols(["h2"])  # as gRPC wants it
    with (
        socket.create_connection(("127.0.0.1", port or cluster.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        return connection.getpeercert(binary_form=True) or b""


def test_a_new_certificate_is_taken_on(secure: EchoCluster) -> None:
    before, grpc_port = serial(secure), int(secure.grpc.rpartition(":")[2])
    assert serial(secure, grpc_port) == before
    (secure.run_dir / "server.pem").write_text("broken")
    secure.wait(lambda: "not read again" in secure.front_log.read_text(), 30)
    assert serial(secure) == serial(secure, grpc_port) == before
    certificate(secure.run_dir, "server", "ca")
    secure.wait(lambda: serial(secure) != before, 30)
    secure.wait(lambda: serial(secure, grpc_port) == serial(secure), 30)
    assert client_of(secure).models.list().data
