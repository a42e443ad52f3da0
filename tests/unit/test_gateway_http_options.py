"""What requests may ask for beside tokens: ranges, defaults, deadlines, over an echo world."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.echo_world import EchoCluster
from tests.unit.http_asking import CHAT, TEXT, ask, chat, events


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    options = ("--max-model-len", "500", "--kv-cache-tokens", "400")
    with EchoCluster(tmp_path_factory.mktemp("run"), step_s=0.01, world_options=options) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("presence_penalty", 2.1, "from -2 to 2"),
        ("frequency_penalty", -3, "from -2 to 2"),
        ("frequency_penalty", "x", "got `str`"),
        ("repetition_penalty", 0, "above 0, at most 100"),
        ("repetition_penalty", 101, "above 0, at most 100"),
        ("min_p", 1.5, "from 0 to 1"),
        ("min_p", -0.1, "from 0 to 1"),
        ("min_tokens", -1, "from 0 to max_tokens"),
        ("min_tokens", 21, "here 20"),
        ("logit_bias", {"x": 1}, "token ids, in decimal"),
        ("logit_bias", {"-1": 1}, "token ids, in decimal"),
        ("logit_bias", {"²": 1}, "token ids, in decimal"),
        ("logit_bias", {"5": 101}, "from -100 to 100"),
        ("logit_bias", {"300": 1}, "allowed: 0 to 299"),
        ("logit_bias", {"9999999999": 1}, "allowed: 0 to 299"),
        ("logit_bias", {str(number): 1 for number in range(1025)}, "up to 1024"),
        ("logit_bias", [1], "Expected `object | null`"),
        ("bad_words", [""], "words of 1 to 256"),
        ("bad_words", ["  "], "words of 1 to 256"),
        ("bad_words", ["x" * 257], "words of 1 to 256"),
        ("bad_words", ["x"] * 129, "up to 128"),
        ("bad_words", "x", "got `str`"),
        ("stop_token_ids", [300], "allowed: 0 to 299"),
        ("priority", 2**31, "32-bit"),
        ("priority", 1.5, "got `float`"),
        ("timeout", 0, "above 0, at most 86400 seconds"),
        ("timeout", -1, "above 0"),
        ("timeout", 1e9, "at most 86400"),
    ],
)
def test_values_out_of_range_are_told_the_range(
    cluster: EchoCluster, field: str, value: object, says: str
) -> None:
    for path, body in ((CHAT, chat("abc")), (TEXT, {"prompt": "abc"})):
        status, _, answer = ask(cluster, path, {**body, "max_tokens": 20, field: value})
        assert status == 400, answer
        assert answer["error"]["param"] == field
        assert says in answer["error"]["message"]


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 0.5},
        {"min_p": 1, "min_tokens": 20, "max_tokens": 20},
        {"logit_bias": {"0": -100, "299": 100.0}, "bad_words": ["x", " yz"]},
        {"priority": -5, "timeout": 60},
        {"min_p": None, "min_tokens": None, "logit_bias": None, "bad_words": None, "timeout": None},
    ],
)
def test_values_in_range_are_accepted(cluster: EchoCluster, options: dict[str, object]) -> None:
    for path, body in ((CHAT, chat("abc")), (TEXT, {"prompt": "abc"})):
        assert ask(cluster, path, {**body, **options})[0] == 200


def test_a_timeout_ends_the_request_as_an_error(cluster: EchoCluster) -> None:
    body = {"prompt": "abc", "max_tokens": 300, "ignore_eos": True, "timeout": 0.3}
    began = time.monotonic()
    status, headers, answer = ask(cluster, TEXT, body)
    assert 0.25 < time.monotonic() - began < 1.5
    assert (status, answer["error"]["code"]) == (408, "timeout")
    _, _, short = ask(cluster, TEXT, {**body, "timeout": 0.0523})
    assert "its timeout of 0.0523 s" in short["error"]["message"], "what was asked, not what was left of it"
    assert "cancelled at its timeout of 0.3 s" in answer["error"]["message"]
    assert headers["x-should-retry"] == "false"
    *chunks, error = events(ask(cluster, TEXT, {**body, "stream": True})[2])
    assert len(chunks) > 3 and error["error"]["code"] == "timeout"
    cluster.wait(lambda: b'phalanx_requests_live{model="echo"} 0.0' in cluster.get("/metrics")[1])
    # One that is done in time knows nothing of it.
    assert ask(cluster, TEXT, {"prompt": "abc", "max_tokens": 3, "timeout": 5})[0] == 200


def test_a_timeout_goes_on_while_no_world_is_there(cluster: EchoCluster) -> None:
    cluster.kill_world()
    cluster.wait_serving(None)
    began = time.monotonic()
    status, _, answer = ask(cluster, TEXT, {"prompt": "abc", "timeout": 0.3})
    assert (status, answer["error"]["code"]) == (408, "timeout")
    assert time.monotonic() - began < 1.5
    cluster.wait_serving(cluster.start_world())


def test_a_timeout_holds_before_the_first_world(tmp_path: Path) -> None:
    with EchoCluster(tmp_path) as empty:
        empty.wait(lambda: bool(empty.states))
        status, _, answer = ask(empty, CHAT, chat(timeout=0.2))
        assert (status, answer["error"]["code"]) == (408, "timeout")
