"""The wire messages: what is sent comes back, what is no message is refused, nothing else ever happens."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import protocol
from gateway.control_messages import decode_control_message
from gateway.protocol import (
    Cancel,
    Failed,
    Hello,
    Limits,
    Output,
    Ping,
    Pong,
    ProtocolError,
    SamplingParams,
    Stats,
    Submit,
    Tokens,
    Welcome,
    decode_client_message,
    decode_server_message,
    encode,
)

LIMITS = Limits(max_model_len=100, kv_cache_tokens=200, max_num_seqs=8, vocab_size=50)

token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=20)
params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 2**40),
    temperature=st.floats(0, 100),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 1000),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    choice=st.integers(0, 2**16 - 1),
    ignore_eos=st.booleans(),
    stop_token_ids=token_ids,
)
submits = st.builds(
    Submit,
    request_id=st.text(min_size=1, max_size=50),
    epoch=st.integers(0, 2**40),
    prompt_token_ids=token_ids,
    prompt=st.none() | st.text(),
    output_token_ids=token_ids,
    params=params,
    stop=st.lists(st.text(), max_size=4),
)


@settings(deadline=None)
@given(submits)
def test_a_submit_comes_back_as_it_was_sent(submit: Submit) -> None:
    assert decode_client_message(encode(submit)) == submit


@pytest.mark.parametrize("message", [Hello(client="me"), Cancel("a", 3), Ping(1.5)])
def test_client_messages_come_back(message: Hello | Cancel | Ping) -> None:
    assert decode_client_message(encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        Welcome(1, 3, "m", 2, 1, LIMITS, [2]),
        Tokens(3, 7, [Output("a", 0, [1, 2]), Output("b", 5, [], "stop", "END", "text")]),
        Failed(3, None, "bad_message", "no"),
        Pong(1.5, 3),
        Stats(3, 1, 2, 3, 4, 5, 6, 7, 8),
    ],
)
def test_server_messages_come_back(message: protocol.ServerMessage) -> None:
    assert decode_server_message(encode(message)) == message


def test_unknown_keys_are_ignored() -> None:
    frame = msgspec.msgpack.encode({"type": "cancel", "request_id": "a", "since_version": 7})
    assert decode_client_message(frame) == Cancel("a")


def test_outputs_may_grow_at_their_end() -> None:
    output = Output("a", 0, [5])
    grown = [*msgspec.to_builtins(output), "new", {"newer": 1}]
    frame = msgspec.msgpack.encode({"type": "tokens", "epoch": 1, "step": 1, "outputs": [grown]})
    assert decode_server_message(frame) == Tokens(1, 1, [output])


@pytest.mark.parametrize(
    "content",
    [
        {"type": "submit"},
        {"type": "submit", "request_id": ""},
        {"type": "submit", "request_id": "a" * 257},
        {"type": "submit", "request_id": "a", "prompt_token_ids": ["1"]},
        {"type": "submit", "request_id": "a", "prompt_token_ids": [-1]},
        {"type": "submit", "request_id": "a", "prompt_token_ids": [2**31]},
        {"type": "submit", "request_id": "a", "params": {"max_tokens": 0}},
        {"type": "submit", "request_id": "a", "params": {"temperature": -1.0}},
        {"type": "submit", "request_id": "a", "params": {"top_p": 0.0}},
        {"type": "submit", "request_id": "a", "params": {"seed": 1.5}},
        {"type": "submit", "request_id": "a", "params": {"stop_token_ids": [1] * 257}},
        {"type": "tokens", "epoch": 1, "step": 1, "outputs": []},
        {"type": "unheard_of"},
        {"request_id": "a"},
        ["submit"],
        17,
        None,
    ],
)
def test_what_is_no_client_message_is_refused(content: Any) -> None:
    with pytest.raises(ProtocolError):
        decode_client_message(msgspec.msgpack.encode(content))


def test_a_frame_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(ProtocolError, match="at most"):
        decode_client_message(bytes(protocol.MAX_MESSAGE_BYTES + 1))


def test_deep_nesting_is_refused() -> None:
    frame = b"\x82\xa4type\xa4ping\xa1x" + b"\x91" * 1_000_000
    with pytest.raises(ProtocolError):
        decode_client_message(frame)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_refused(frame: bytes) -> None:
    for decode in (decode_client_message, decode_server_message, decode_control_message):
        try:
            decode(frame)
        except ProtocolError:
            continue


@settings(deadline=None)
@given(submits, st.data())
def test_a_damaged_frame_is_a_message_or_refused(submit: Submit, data: st.DataObject) -> None:
    frame = bytearray(encode(submit))
    frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode_client_message(bytes(frame))
    except ProtocolError:
        return
