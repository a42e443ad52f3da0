"""The ZeroMQ protocol as another language sees it, against a real front over an echo world: versions, flow
control, conversations, keys. The client knows pyzmq, msgpack and docs/zeromq.md only."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
import zmq.auth

from gateway.client import Client, ConnectionLost, SamplingParams
from tests.echo_world import EchoCluster
from tests.plain_client import PlainClient

DOCUMENT = Path(__file__).parents[2] / "docs" / "zeromq.md"
pytestmark = pytest.mark.slow
TEXT = "".join(f"{number} and " for number in range(400))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the keys of the server and of two clients, one of whom was shut out again."""
    folder: Path = tmp_path_factory.mktemp("keys") / "curve"
    for name in ("friend", "stranger"):
        command = [sys.executable, "-m", "launcher.cli", "curve-keygen", str(folder), "--client", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    (folder / "authorized_clients" / "stranger.key").unlink()
    return folder


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EchoCluster(tmp_path_factory.mktemp("echo")) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster.zmq


def of_file(folder: Path, name: str) -> tuple[bytes, bytes, bytes]:
    server, _ = zmq.auth.load_certificate(folder / "server.key")
    public, secret = zmq.auth.load_certificate(folder / "clients" / f"{name}.key_secret")
    assert secret is not None
    return server, public, secret


def test_hello_tells_versions_and_capabilities(endpoint: str) -> None:
    with PlainClient(endpoint) as plain:
        welcome = plain.answer("welcome")
    assert (welcome["version"], welcome["epoch"], welcome["model"]) == (1, 0, "echo")
    assert {"text", "chat", "stop", "deadline", "resume", "credit"} <= set(welcome["capabilities"])
    with PlainClient(endpoint, min_version=1, max_version=7, capabilities=["of a later day"]) as plain:
        assert plain.answer("welcome")["version"] == 1
    with PlainClient(endpoint, min_version=2, max_version=3) as plain:
        refusal = plain.answer("welcome")
    assert refusal["code"] == "bad_message"
    assert "speaks protocol version 1, the client 2 to 3" in refusal["message"]


def example_of_the_page() -> list[tuple[str, bytes]]:
    """Who sends what, in the page's order."""
    [block] = re.findall(r"```text\n(client .*?)```", DOCUMENT.read_text(), re.DOTALL)
    frames = re.findall(r"^(client|server)  [^\n]*\n((?:    [0-9a-f ]+\n)+)", block, re.MULTILINE)
    return [(who, bytes.fromhex(digits)) for who, digits in frames]


def test_the_page_s_bytes_are_what_is_said(endpoint: str) -> None:
    """The client's frames are sent as they stand there; the server's answers mean what the page says."""
    example = example_of_the_page()
    assert len(example) == 12
    with PlainClient(endpoint, quiet=True) as plain:
        for who, frame in example:
            if who == "client":
                plain.socket.send(frame)
                continue
            expected = msgpack.unpackb(frame)
            if expected["type"] != "tokens":
                assert plain.answer(expected["type"]) == expected
                continue
            [wanted] = expected["outputs"]
            brought: list[int] = []
            while len(brought) < len(wanted[2]):
                message = plain.answer("tokens")
                assert set(message) == set(expected)
                [output] = message["outputs"]
                assert output[1] == wanted[1] + len(brought) and len(output) == len(wanted)
                brought += output[2]
            assert (brought, output[3]) == (wanted[2], wanted[3])


def test_a_slow_reader_gets_what_it_asks_for_and_holds_nobody(endpoint: str) -> None:
    with PlainClient(endpoint) as plain:
        plain.answer("welcome")
        params = {"max_tokens": 250, "temperature": 0.0}
        plain.submit("slow", prompt=TEXT, params=params, credit=5, key="slow-reader-of-this-test")
        plain.submit("none", prompt=TEXT, params=params, credit=0)
        plain.submit("fast", prompt=TEXT, params=params)
        plain.finish("fast")
        assert plain.text("fast") == TEXT[:250]
        plain.settle()
        assert len(plain.tokens("slow")) == 5 and plain.outputs["none"] == []
        plain.send(type="credit", request_id="slow", tokens=7)
        plain.settle()
        assert plain.text("slow") == TEXT[:12]
        # Another connection takes it up behind what has come, with a credit of its own.
        with PlainClient(endpoint) as other:
            other.answer("welcome")
            known = plain.tokens("slow")
            other.submit(
                "again",
                prompt=TEXT,
                params=params,
                credit=3,
                output_token_ids=known,
                key="slow-reader-of-this-test",
            )
            other.settle()
            [output] = other.outputs["again"]
            assert (output[1], output[5]) == (12, TEXT[12:15])
            other.send(type="credit", request_id="again", tokens=10**6)
            other.finish("again")
            assert "".join(output[5] for output in other.outputs["again"]) == TEXT[12:250]
        plain.send(type="cancel", request_id="none")
        plain.finish("none")
        assert [output[1:4] for output in plain.outputs["none"]] == [[0, [], "cancelled"]]
        plain.send(type="credit", request_id="slow", tokens=10**6)
        plain.finish("slow")
        assert plain.text("slow") == TEXT[:250] and plain.tokens("slow") == plain.tokens("fast")


def test_a_client_s_stream_holds_no_more_than_its_window(endpoint: str) -> None:
    with Client(endpoint, window_tokens=16) as client:
        stream = client.submit(TEXT, SamplingParams(max_tokens=250))
        other = client.generate(TEXT, SamplingParams(max_tokens=250))
        assert other.text == TEXT[:250]
        time.sleep(0)
        assert stream._events.qsize() <= 16
        assert stream.collect().text == TEXT[:250]


def test_conversations(endpoint: str) -> None:
    with PlainClient(endpoint) as plain:
        plain.answer("welcome")
        messages = [{"role": "user", "content": "Say this."}]
        plain.submit("chat", messages=messages, params={"max_tokens": 100})
        plain.finish("chat")
        assert plain.text("chat") == "user\nSay this."  # up to the end of the first message
        plain.submit("both", messages=messages, prompt="x")
        plain.finish("both")
        assert plain.failures["both"]["code"] == "invalid_request"
    with Client(endpoint) as client:
        assert client.generate(messages, SamplingParams(max_tokens=100)).text == "user\nSay this."
        with pytest.raises(ValueError, match="a role and a text"):
            client.generate([{"role": "user"}])


def test_keys_and_who_is_let_in(keys: Path, tmp_path: Path) -> None:
    assert (keys / "server.key_secret").stat().st_mode & 0o777 == 0o600
    with EchoCluster(tmp_path, front_options=("--zmq-curve-dir", str(keys))) as cluster:
        cluster.wait_serving(cluster.start_world())
        endpoint = cluster.zmq
        params = SamplingParams(max_tokens=8)
        server_key = keys / "server.key"
        friend, stranger = (keys / "clients" / f"{name}.key_secret" for name in ("friend", "stranger"))
        with Client(endpoint, server_key=server_key, client_key=friend) as client:
            assert client.generate("hello there", params).text.startswith("hello there")
        with PlainClient(endpoint, of_file(keys, "friend")) as plain:
            assert plain.answer("welcome")["model"] == "echo"
        # By the environment, as the command shows it.
        public = zmq.auth.load_certificate(server_key)[0].decode()
        program = "import sys, phalanx\nwith phalanx.Client(sys.argv[1]) as c: print(c.generate('abc').text)"
        environment = {**os.environ, "PHALANX_ZMQ_SERVER_KEY": public, "PHALANX_ZMQ_CLIENT_KEY": str(friend)}
        done = subprocess.run(
            [sys.executable, "-c", program, endpoint],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout == "abcabcabcabcabca\n", done.stderr
        for refused in (
            {"server_key": server_key, "client_key": stranger},  # not on the list
            {"server_key": keys / "clients" / "stranger.key_secret", "client_key": friend},  # another server
            {},  # no keys
        ):
            with pytest.raises(ConnectionLost, match="key"):
                Client(endpoint, connect_timeout_s=5, **refused).connect()
        # Whoever is put onto the list is let in at once.
        (keys / "authorized_clients" / "stranger.key").write_bytes(stranger.read_bytes())
        with Client(endpoint, server_key=server_key, client_key=stranger) as client:
            assert client.generate("abc", params).text.startswith("abcabc")
    with pytest.raises(ConnectionLost):
        Client("tcp://127.0.0.1:1", server_key=server_key, client_key=friend, connect_timeout_s=0.2).connect()
