"""The gateway of rank 0 over real sockets, spoken to frame by frame."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

import msgspec
import pytest
import zmq

from gateway import router as router_module
from gateway.errors import EndpointError
from gateway.protocol import (
    MAX_MESSAGE_BYTES,
    Cancel,
    ClientMessage,
    Failed,
    Hello,
    Limits,
    Output,
    Ping,
    Pong,
    SamplingParams,
    ServerMessage,
    Stats,
    Submit,
    Tokens,
    Welcome,
    decode_server_message,
    encode,
)
from gateway.rank0 import MAX_WAIT_S, Rank0Gateway

LIMITS = Limits(max_model_len=100, kv_cache_tokens=80, max_num_seqs=8, vocab_size=50)
EPOCH = 3
_Kind = TypeVar("_Kind", bound=ServerMessage)


class Peer:
    """A client that speaks single frames, and lets the gateway run while it waits for an answer."""

    def __init__(self, gateway: Rank0Gateway) -> None:
        self._gateway = gateway
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.set(zmq.LINGER, 0)
        self.socket.connect(gateway.endpoint)

    def send(self, *messages: ClientMessage | bytes) -> None:
        for message in messages:
            self.socket.send(message if isinstance(message, bytes) else encode(message))

    def receive(self, kind: type[_Kind]) -> _Kind:
        deadline = time.monotonic() + 10
        while not self.socket.poll(0):
            assert time.monotonic() < deadline, f"no {kind.__name__} came"
            assert self._gateway.receive(0.02) == []
        message = decode_server_message(self.socket.recv())
        assert isinstance(message, kind), message
        return message

    def silent(self, timeout_s: float = 0.1) -> bool:
        return not self.socket.poll(int(timeout_s * 1000))


@pytest.fixture
def gateway() -> Iterator[Rank0Gateway]:
    gateway = Rank0Gateway("tcp://127.0.0.1:*", EPOCH, "m", 2, 1, LIMITS, [2])
    yield gateway
    gateway.close()


@pytest.fixture
def stranger(gateway: Rank0Gateway) -> Iterator[Peer]:
    peer = Peer(gateway)
    yield peer
    peer.context.destroy(linger=0)


@pytest.fixture
def peer(gateway: Rank0Gateway, stranger: Peer) -> Peer:
    stranger.send(Hello())
    take(gateway)
    stranger.receive(Welcome)
    return stranger


def take(
    gateway: Rank0Gateway, count: int = 0, timeout_s: float = 0.2
) -> list[tuple[bytes, Submit | Cancel]]:
    """What the gateway hands to the step loop, until `count` requests came or the time has passed."""
    requests: list[tuple[bytes, Submit | Cancel]] = []
    deadline = time.monotonic() + (2 if count else timeout_s)
    while time.monotonic() < deadline and (not count or len(requests) < count):
        requests += gateway.receive(0.05)
    assert len(requests) == count
    return requests


def submit(request_id: str = "a", tokens: int = 3, **options: object) -> Submit:
    return Submit(request_id, prompt_token_ids=[1] * tokens, **options)  # type: ignore[arg-type]


def test_hello_is_answered_with_the_world(gateway: Rank0Gateway, stranger: Peer) -> None:
    stranger.send(Hello(client="test"))
    take(gateway)
    assert stranger.receive(Welcome) == Welcome(1, EPOCH, "m", 2, 1, LIMITS, [2], ["pooling", "stats"])


def test_a_version_that_is_not_spoken_is_refused(gateway: Rank0Gateway, stranger: Peer) -> None:
    stranger.send(Hello(min_version=2, max_version=5), submit())
    take(gateway)
    refusal = stranger.receive(Failed)
    assert (refusal.code, refusal.request_id) == ("bad_message", None)
    assert "version 1" in refusal.message and "2 to 5" in refusal.message
    assert stranger.receive(Failed).code == "not_connected"


def test_a_newer_client_that_speaks_this_version_is_served(gateway: Rank0Gateway, stranger: Peer) -> None:
    stranger.send(Hello(min_version=1, max_version=9))
    take(gateway)
    assert stranger.receive(Welcome).version == 1


def test_a_stranger_is_told_to_say_hello(gateway: Rank0Gateway, stranger: Peer) -> None:
    stranger.send(submit("a"), Ping(), Cancel("a"))
    take(gateway)
    assert stranger.receive(Failed).request_id == "a"
    assert [stranger.receive(Failed).code for _ in range(2)] == ["not_connected"] * 2


def test_a_submit_reaches_the_loop_and_its_tokens_the_client(gateway: Rank0Gateway, peer: Peer) -> None:
    sent = submit(params=SamplingParams(max_tokens=2, seed=5), output_token_ids=[9])
    peer.send(sent)
    [(client, received)] = take(gateway, 1)
    assert received == sent
    outputs = [(client, Output("a", 1, [7], "length"))]
    gateway.send_tokens(4, outputs)
    assert peer.receive(Tokens) == Tokens(EPOCH, 4, [Output("a", 1, [7], "length")])


def test_a_submit_without_a_seed_gets_one(gateway: Rank0Gateway, peer: Peer) -> None:
    peer.send(submit("a"), submit("b"), submit("c", params=SamplingParams(seed=0)))
    seeds = [message.params.seed for _, message in take(gateway, 3) if isinstance(message, Submit)]
    assert None not in seeds and seeds[0] != seeds[1] and seeds[2] == 0


def test_the_tokens_of_a_step_travel_in_one_message(gateway: Rank0Gateway, peer: Peer) -> None:
    other = Peer(gateway)
    other.send(Hello(), submit("x"))
    peer.send(submit("a"), submit("b"))
    requests = {message.request_id: client for client, message in take(gateway, 3)}
    gateway.send_tokens(1, [(requests[name], Output(name, 0, [4])) for name in ("a", "x", "b")])
    assert [output.request_id for output in peer.receive(Tokens).outputs] == ["a", "b"]
    other.receive(Welcome)
    assert [output.request_id for output in other.receive(Tokens).outputs] == ["x"]
    other.context.destroy(linger=0)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (Submit("a"), "empty"),
        (Submit("a", prompt="text"), "front"),
        (submit(stop=["x"]), "front"),
        (submit(deadline_s=1.0), "front"),
        (submit(params=SamplingParams(grammar="x" * 70_000)), "up to 65536"),
        (submit(params=SamplingParams(max_tokens=4, min_tokens=5)), "min_tokens is 5; allowed: up to 4"),
        (submit(params=SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))), "up to 1024"),
        (Submit("a", prompt_token_ids=[50]), "vocabulary"),
        (submit(output_token_ids=[50]), "vocabulary"),
        (submit(params=SamplingParams(logit_bias={50: 1.0})), "logit_bias: token id 50"),
        (submit(params=SamplingParams(logit_bias={-1: 1.0})), "logit_bias: token id -1"),
        (submit(params=SamplingParams(stop_token_ids=[99])), "stop_token_ids: token id 99"),
        (submit(params=SamplingParams(bad_words=[[1, 50]])), "bad_words: token id 50"),
        (submit(tokens=90, params=SamplingParams(max_tokens=11)), "maximum length of this model is 100"),
        (submit(tokens=70, params=SamplingParams(max_tokens=11)), "KV cache holds 80"),
        (submit(output_token_ids=[1, 2], params=SamplingParams(max_tokens=2)), "leaves none"),
    ],
)
def test_what_the_world_cannot_do_is_refused(
    gateway: Rank0Gateway, peer: Peer, message: Submit, says: str
) -> None:
    peer.send(message)
    take(gateway)
    refusal = peer.receive(Failed)
    assert (refusal.code, refusal.request_id) == ("invalid_request", "a")
    assert says in refusal.message
    peer.send(submit("a"))  # the id is free again
    take(gateway, 1)


def test_bad_frames_are_answered_and_do_no_harm(gateway: Rank0Gateway, peer: Peer) -> None:
    peer.send(b"", b"\xc1", b"not msgpack", msgspec.msgpack.encode({"type": "submit", "request_id": 5}))
    peer.socket.send_multipart([b"", encode(submit())])
    take(gateway)
    assert [peer.receive(Failed).code for _ in range(5)] == ["bad_message"] * 5
    peer.send(Ping(2.5))
    take(gateway)
    assert peer.receive(Pong) == Pong(2.5, EPOCH)


def test_a_message_over_the_limit_ends_only_its_connection(gateway: Rank0Gateway, peer: Peer) -> None:
    rude = Peer(gateway)
    rude.send(bytes(MAX_MESSAGE_BYTES + 1))
    take(gateway)
    peer.send(submit())
    take(gateway, 1)
    rude.context.destroy(linger=0)


def test_messages_for_another_epoch_are_dropped(gateway: Rank0Gateway, peer: Peer) -> None:
    peer.send(submit("old", epoch=EPOCH - 1), submit("any"), submit("this", epoch=EPOCH))
    assert [message.request_id for _, message in take(gateway, 2)] == ["any", "this"]
    peer.send(Cancel("any", EPOCH - 1), Cancel("this", EPOCH))
    assert [message.request_id for _, message in take(gateway, 1)] == ["this"]
    assert peer.silent()


def test_an_id_in_use_is_refused_without_harm_to_its_owner(gateway: Rank0Gateway, peer: Peer) -> None:
    peer.send(submit("a"), submit("a"))
    take(gateway, 1)
    refusal = peer.receive(Failed)
    assert (refusal.code, refusal.request_id) == ("bad_message", None)
    assert "already in use" in refusal.message


def test_cancels_reach_the_loop_while_their_request_runs(gateway: Rank0Gateway, peer: Peer) -> None:
    peer.send(Cancel("a"), submit("a"), Cancel("a"))
    [(client, _), (_, cancel)] = take(gateway, 2)
    assert isinstance(cancel, Cancel)
    gateway.send_tokens(1, [(client, Output("a", 0, [], "cancelled"))])
    assert peer.receive(Tokens).outputs[0].finish_reason == "cancelled"
    peer.send(Cancel("a"))
    take(gateway)


def test_a_failure_frees_the_id(gateway: Rank0Gateway, peer: Peer) -> None:
    peer.send(submit("a"))
    [(client, _)] = take(gateway, 1)
    gateway.send_failed(client, "a", "internal", "out of luck")
    assert peer.receive(Failed) == Failed(EPOCH, "a", "internal", "out of luck")
    peer.send(submit("a"))
    take(gateway, 1)


def test_a_client_that_went_away_is_lost_with_its_next_token(gateway: Rank0Gateway, peer: Peer) -> None:
    peer.send(submit("a"))
    [(client, _)] = take(gateway, 1)
    peer.socket.close(0)
    deadline = time.monotonic() + 2
    while not (lost := gateway.lost_clients()):
        assert time.monotonic() < deadline
        gateway.send_tokens(1, [(client, Output("a", 0, [4]))])
        time.sleep(0.01)
    assert lost == [client]
    assert gateway.lost_clients() == []
    gateway.send_tokens(2, [(client, Output("a", 1, [4]))])  # late tokens are nobody's


def test_a_silent_client_is_lost(gateway: Rank0Gateway, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "CLIENT_SILENCE_S", 0.3)
    monkeypatch.setattr(router_module, "SILENCE_CHECK_S", 0.01)
    for _ in range(5):
        peer.send(Ping())
        take(gateway, timeout_s=0.1)
    assert gateway.lost_clients() == []
    take(gateway, timeout_s=0.5)
    assert len(gateway.lost_clients()) == 1
    while not peer.silent():
        peer.receive(Pong)
    peer.send(submit())
    take(gateway)
    assert peer.receive(Failed).code == "not_connected"
    peer.send(Hello(), submit())
    take(gateway, 1)


def test_a_gateway_that_was_late_itself_does_not_blame_its_clients(
    gateway: Rank0Gateway, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_module, "CLIENT_SILENCE_S", 0.3)
    peer.send(Ping())
    time.sleep(0.6)  # a long step; the ping waits in the queue
    gateway.receive(0)
    assert gateway.lost_clients() == []


def test_stats_go_out_when_they_changed_and_not_too_often(gateway: Rank0Gateway, peer: Peer) -> None:
    for step in range(100):
        gateway.send_stats(step, 1, 0, 5, 10, 0, 7, step)
    assert peer.receive(Stats).step == 0
    take(gateway, timeout_s=0.8)  # a waiting receive sends the last one
    assert peer.receive(Stats).step == 99
    gateway.send_stats(99, 1, 0, 5, 10, 0, 7, 99)
    take(gateway, timeout_s=0.7)
    assert peer.silent()


def test_a_new_client_is_told_the_last_stats(gateway: Rank0Gateway, stranger: Peer) -> None:
    gateway.send_stats(8, 1, 0, 5, 10, 0, 7, 8)
    stranger.send(Hello())
    take(gateway)
    stranger.receive(Welcome)
    assert stranger.receive(Stats).step == 8


def test_receive_waits_only_while_nothing_is_there(gateway: Rank0Gateway, peer: Peer) -> None:
    start = time.monotonic()
    assert gateway.receive(0) == []
    assert time.monotonic() - start < 0.02
    start = time.monotonic()
    assert gateway.receive(30) == []
    assert MAX_WAIT_S * 0.8 < time.monotonic() - start < MAX_WAIT_S + 0.2
    peer.send(submit())
    start = time.monotonic()
    while not gateway.receive(30):
        pass
    assert time.monotonic() - start < 0.1


@pytest.mark.parametrize("endpoint", ["nonsense", "tcp://127.0.0.1:notaport", "tcp://203.0.113.1:*"])
def test_an_endpoint_that_cannot_be_bound_is_named(endpoint: str) -> None:
    with pytest.raises(EndpointError, match="cannot listen at"):
        Rank0Gateway(endpoint, 1, "m", 1, 1, LIMITS, [2])


def test_an_endpoint_that_is_taken_is_named(gateway: Rank0Gateway) -> None:
    with pytest.raises(EndpointError, match="in use"):
        Rank0Gateway(gateway.endpoint, 1, "m", 1, 1, LIMITS, [2])
