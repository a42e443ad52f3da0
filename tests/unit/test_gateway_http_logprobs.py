"""Log-probabilities, echo and best_of over an echo world, whose log-probabilities are known beforehand."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.echo_world import EchoCluster
from tests.unit.http_asking import CHAT, TEXT, ask, chat, events, usage_of


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    with EchoCluster(tmp_path_factory.mktemp("run"), step_s=0.002) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


def complete(cluster: EchoCluster, **body: object) -> Any:
    status, _, answer = ask(cluster, TEXT, {"prompt": "abc", **body})
    assert status == 200, answer
    return answer


def test_a_chat_s_logprobs(cluster: EchoCluster) -> None:
    body = chat("é", max_tokens=40, logprobs=True, top_logprobs=2)
    _, _, answer = ask(cluster, CHAT, body)
    [choice] = answer["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == answer["usage"]["completion_tokens"]
    # The conversation begins with a special token, which has a name and no text, and ends with one.
    assert [content[0]["token"], content[-1]["token"]] == ["<|im_start|>", "<|im_end|>"]
    text = [entry for entry in content if not entry["token"].startswith("<|")]
    assert "".join(entry["token"] for entry in text) == choice["message"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in text).decode() == choice["message"]["content"]
    for entry in content:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -1.5]
        assert entry["top_logprobs"][0]["token"] == entry["token"] and entry["logprob"] == -0.5


def test_a_chat_s_stream_brings_them_with_their_text(cluster: EchoCluster) -> None:
    body = chat("né😀 hello", max_tokens=40, logprobs=True)
    whole = ask(cluster, CHAT, body)[2]["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in whole)
    streamed = []
    for chunk in events(ask(cluster, CHAT, {**body, "stream": True})[2]):
        [choice] = chunk["choices"]
        entries = choice["logprobs"]["content"] if choice["logprobs"] else []
        own = b"".join(bytes(entry["bytes"]) for entry in entries if not entry["token"].startswith("<|"))
        assert own.decode() == choice["delta"]["content"], "a chunk's tokens are those of its text"
        streamed += entries
    assert streamed == whole


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text"), [("de", "abc"), ("cX", "abcdefabc"), (["efabc", "zzz"], "abcd"), ("b", "a")]
)
def test_stop_strings_take_theirs_along(cluster: EchoCluster, stop: object, text: str, stream: bool) -> None:
    body = {"prompt": "abcdef", "max_tokens": 9, "stop": stop, "logprobs": 1, "stream": stream}
    answer = ask(cluster, TEXT, body)[2]
    choices = [chunk["choices"][0] for chunk in events(answer)] if stream else answer["choices"]
    assert "".join(choice["text"] for choice in choices) == text
    tokens = [token for choice in choices for token in (choice["logprobs"] or {"tokens": []})["tokens"]]
    assert tokens == list(text)
    if stream:
        assert all("".join((c["logprobs"] or {"tokens": []})["tokens"]) == c["text"] for c in choices)


def test_a_completion_s_logprobs(cluster: EchoCluster) -> None:
    answer = complete(cluster, prompt="aé", max_tokens=4, logprobs=2)
    [choice] = answer["choices"]
    assert choice["text"] == "aéaé"
    logprobs = choice["logprobs"]
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert logprobs["tokens"] == ["a", "é"] * 2
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert logprobs["token_logprobs"] == [-0.5] * 4
    assert logprobs["top_logprobs"][0] == {"a": -0.5, "b": -1.5}
    zero = complete(cluster, max_tokens=2, logprobs=0)["choices"][0]["logprobs"]
    assert zero["top_logprobs"] == [{"a": -0.5}, {"b": -0.5}]
    assert complete(cluster)["choices"][0]["logprobs"] is None


def test_parts_of_characters_have_names_of_their_own(cluster: EchoCluster) -> None:
    answer = complete(cluster, prompt="😀", max_tokens=4, logprobs=0)
    [choice] = answer["choices"]
    assert choice["text"] == "😀"
    assert choice["logprobs"]["tokens"] == [f"bytes:\\x{byte:02x}" for byte in "😀".encode()]
    assert choice["logprobs"]["text_offset"] == [0] * 4


@pytest.mark.parametrize("prompt", ["abcd", [67, 68, 69, 70]])
def test_echo_with_logprobs_is_what_evaluations_read(cluster: EchoCluster, prompt: object) -> None:
    answer = complete(cluster, prompt=prompt, max_tokens=2, echo=True, logprobs=1, temperature=0)
    [choice] = answer["choices"]
    assert choice["text"] == "abcdab"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == list(choice["text"])
    assert logprobs["token_logprobs"] == [None, *[-0.5] * 5]
    assert logprobs["top_logprobs"][0] is None
    pairs = list(zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))
    assert all(token in top for token, top in pairs[1:])
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4, 5]
    assert answer["usage"] == usage_of(4, 2)
    assert "prompt_logprobs" not in choice


def test_echo_alone(cluster: EchoCluster) -> None:
    answer = complete(cluster, prompt=["abc", "xyz"], n=2, max_tokens=1, echo=True)
    assert [choice["text"] for choice in answer["choices"]] == ["abca", "abcb", "xyzx", "xyzy"]
    nothing = complete(cluster, prompt="abc", max_tokens=0, echo=True, logprobs=1)
    [choice] = nothing["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert nothing["usage"] == usage_of(3, 0)


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_echo_in_a_stream(cluster: EchoCluster, max_tokens: int) -> None:
    body = {"prompt": ["abc", "xyz"], "n": 2, "max_tokens": max_tokens, "echo": True, "logprobs": 1}
    whole = complete(cluster, **body)["choices"]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage = events(ask(cluster, TEXT, {**body, **options})[2])
    assert usage["usage"]["completion_tokens"] == 4 * max_tokens
    for expected in whole:
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == expected["index"]]
        assert "".join(choice["text"] for choice in mine) == expected["text"]
        for name, values in expected["logprobs"].items():
            parts = [value for choice in mine if choice["logprobs"] for value in choice["logprobs"][name]]
            assert parts == values
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["length"]


def test_prompt_logprobs_as_vllm_has_them(cluster: EchoCluster) -> None:
    expected = [
        None,
        {
            "68": {"logprob": -0.5, "rank": 1, "decoded_token": "b"},
            "69": {"logprob": -1.5, "rank": 2, "decoded_token": "c"},
        },
    ]
    answer = complete(cluster, prompt="ab", n=2, prompt_logprobs=2)
    assert [choice["prompt_logprobs"] for choice in answer["choices"]] == [expected] * 2
    both = complete(cluster, prompt="ab", echo=True, logprobs=1, prompt_logprobs=2)["choices"][0]
    assert both["prompt_logprobs"] == expected
    assert both["logprobs"]["top_logprobs"][1] == {"b": -0.5}
    _, _, answer = ask(cluster, CHAT, chat("ab", prompt_logprobs=0))
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


def test_best_of_shows_the_best(cluster: EchoCluster) -> None:
    answer = complete(cluster, prompt=["abc", "xyz"], best_of=3, n=2, max_tokens=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][0] in "abc" for choice in answer["choices"]] == [True, True, False, False]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 2 * 3 * 3  # all that were made
    assert complete(cluster, best_of=1, max_tokens=3)["usage"]["completion_tokens"] == 3


def test_they_survive_the_world(cluster: EchoCluster) -> None:
    body = {"prompt": "abcdef", "max_tokens": 600, "echo": True, "logprobs": 1, "stream": True}
    whole = events(ask(cluster, TEXT, body)[2])
    threading.Timer(0.5, cluster.kill_world).start()
    threading.Timer(0.7, cluster.start_world).start()
    again = events(ask(cluster, TEXT, body)[2])

    def strip(chunks: list[Any]) -> list[Any]:
        return [chunk["choices"] for chunk in chunks]

    assert strip(again) == strip(whole)
    assert cluster.states[-1].serving_epoch == cluster.epoch > 1


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        (CHAT, {"logprobs": 5}, "logprobs", "Expected `bool | null`"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        (CHAT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs", "from 0 to 20"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        (CHAT, {"prompt_logprobs": 21}, "prompt_logprobs", "from 0 to 20"),
        (CHAT, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "not available in a stream"),
        (TEXT, {"logprobs": 21}, "logprobs", "from 0 to 20"),
        (TEXT, {"logprobs": -1}, "logprobs", "from 0 to 20"),
        (TEXT, {"logprobs": True}, "logprobs", "from 0 to 20"),
        (TEXT, {"best_of": 129}, "best_of", "to 128"),
        (TEXT, {"best_of": 2, "n": 3}, "best_of", "from n, here 3"),
        (TEXT, {"best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        (TEXT, {"max_tokens": 0}, "max_tokens", "at least 1"),
        (TEXT, {"echo": "yes"}, "echo", "Expected `bool | null`"),
    ],
)
def test_what_is_refused(
    cluster: EchoCluster, path: str, body: dict[str, object], param: str, says: str
) -> None:
    base = chat("abc") if path == CHAT else {"prompt": "abc"}
    status, _, answer = ask(cluster, path, {**base, **body})
    assert (status, answer["error"]["param"]) == (400, param)
    assert says in answer["error"]["message"]
