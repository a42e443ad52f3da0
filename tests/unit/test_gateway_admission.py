"""The waiting room: what may come in, what is told to whoever may not, and that it is empty in the end."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.admission import MAX_RETRY_S, UNKNOWN_RETRY_S, WaitingRoom
from gateway.client import Client, RequestFailed, SamplingParams
from tests.echo_world import EchoCluster
from tests.unit.http_asking import TEXT, ask


def refusal(room: WaitingRoom, num_requests: int, num_tokens: int, now: float = 0.0) -> RequestFailed:
    with pytest.raises(RequestFailed) as failure:
        room.check(num_requests, num_tokens, now)
    return failure.value


def test_full_by_requests_and_full_by_tokens() -> None:
    room = WaitingRoom(3, 100)
    for num_tokens in (50, 49):
        room.check(1, num_tokens, 0.0)
        room.enter(num_tokens)
    room.check(1, 1, 0.0)
    by_tokens = refusal(room, 1, 2)
    assert by_tokens.code == "overloaded" and by_tokens.retry_after_s == UNKNOWN_RETRY_S
    assert "2 requests with 99 prompt tokens are waiting" in by_tokens.message
    assert "allowed: 3 and 100" in by_tokens.message
    assert refusal(room, 2, 1).code == "overloaded"
    room.leave(50, 1.0)
    room.check(1, 51, 1.0)


def test_what_can_never_come_in_is_told_so() -> None:
    room = WaitingRoom(3, 100)
    assert refusal(room, 4, 10).code == "invalid_request"
    assert "--max-waiting)" in refusal(room, 4, 10).message
    assert refusal(room, 1, 101).code == "invalid_request"
    assert "101 prompt tokens" in refusal(room, 1, 101).message


def test_the_time_to_wait_follows_the_pace_of_what_left() -> None:
    room = WaitingRoom(1000, 1000)
    for _ in range(20):
        room.enter(50)
    for second in range(10):  # one a second, 50 tokens each
        room.leave(50, float(second))
    for _ in range(10):
        room.enter(50)
    assert refusal(room, 1, 100, now=10.0).retry_after_s == 2
    assert refusal(room, 1, 500, now=10.0).retry_after_s == 10
    # A minute later nothing of that counts any more.
    assert refusal(room, 1, 500, now=100.0).retry_after_s == UNKNOWN_RETRY_S


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.0, 30.0), st.booleans()), max_size=60),
    st.integers(1, 8),
    st.integers(1, 100),
)
def test_the_bounds_hold_whatever_comes(
    events: list[tuple[int, float, bool]], max_requests: int, max_tokens: int
) -> None:
    room = WaitingRoom(max_requests, max_tokens)
    inside: list[int] = []
    now = 0.0
    for num_tokens, wait_s, leaves in events:
        now += wait_s
        if leaves and inside:
            room.leave(inside.pop(0), now)
        try:
            room.check(1, num_tokens, now)
        except RequestFailed as error:
            if error.code == "overloaded":
                assert error.retry_after_s is not None and 1 <= error.retry_after_s <= MAX_RETRY_S
            else:
                assert num_tokens > max_tokens
        else:
            room.enter(num_tokens)
            inside.append(num_tokens)
        assert (room.num_requests, room.num_tokens) == (len(inside), sum(inside))
        assert len(inside) <= max_requests and sum(inside) <= max_tokens


def test_a_front_refuses_by_tokens_and_takes_more_once_they_are_gone(tmp_path: Path) -> None:
    options = ("--max-waiting-tokens", "100")
    with EchoCluster(tmp_path, front_options=options) as cluster:
        cluster.wait_serving(cluster.start_world())
        cluster.kill_world()
        cluster.wait_serving(None)
        with ThreadPoolExecutor(2) as threads:
            waiting = [threads.submit(ask, cluster, TEXT, {"prompt": "a" * 45}) for _ in range(2)]
            cluster.wait(lambda: b'requests_live{model="echo"} 2.0' in cluster.get("/metrics")[1])
            for path, body in ((TEXT, {"prompt": "b" * 11}), ("/v1/embeddings", {"input": ["b" * 6] * 2})):
                status, headers, answer = ask(cluster, path, body)
                assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
                assert 1 <= int(headers["retry-after"]) <= MAX_RETRY_S
            # Never, however long one waits: many prompts, many choices, many inputs.
            for path, body in (
                (TEXT, {"prompt": ["b" * 26] * 4}),
                (TEXT, {"prompt": "b" * 26, "n": 4}),
                ("/v1/embeddings", {"input": ["b" * 26] * 4}),
            ):
                status, _, answer = ask(cluster, path, body)
                assert status == 400 and "--max-waiting-tokens" in answer["error"]["message"]
            with Client(cluster.zmq) as client:
                with pytest.raises(RequestFailed) as failure:
                    client.generate([5] * 11)
                assert failure.value.code == "overloaded" and failure.value.retry_after_s is not None
                cluster.wait_serving(cluster.start_world())
                assert [future.result(20)[0] for future in waiting] == [200, 200]
                assert client.generate([5] * 100, SamplingParams(max_tokens=3)).token_ids == [5] * 3
