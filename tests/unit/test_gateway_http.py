"""The HTTP endpoints over an echo world: shapes, streams, and what is refused, with what words."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.echo_world import EchoCluster, echo_cached
from tests.unit.http_asking import CHAT, TEXT, ask, chat, events, usage_of


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    options = ("--max-model-len", "500", "--kv-cache-tokens", "400")
    with EchoCluster(tmp_path_factory.mktemp("run"), step_s=0.001, world_options=options) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


@pytest.fixture(scope="module")
def api(cluster: EchoCluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=30)


# --------------------------------------------------------------------------- answers


def test_a_chat_answer_has_openai_s_shape(cluster: EchoCluster) -> None:
    status, headers, answer = ask(cluster, "/v1/chat/completions", chat("abc", max_tokens=9, model="echo"))
    assert (status, headers["content-type"]) == (200, "application/json")
    assert answer["id"].startswith("chatcmpl-") and answer["object"] == "chat.completion"
    assert isinstance(answer["created"], int) and answer["model"] == "echo"
    [choice] = answer["choices"]
    # The echo begins with the conversation itself: <|im_start|> has no text.
    assert choice["message"] == {"role": "assistant", "content": "user\nabc", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    usage = answer["usage"]
    assert usage == usage_of(22, 9)


def test_a_chat_ends_at_the_end_token(cluster: EchoCluster) -> None:
    _, _, answer = ask(cluster, "/v1/chat/completions", chat("abc"))
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 10  # the end token counts
    _, _, answer = ask(cluster, "/v1/chat/completions", chat("abc", ignore_eos=True, max_tokens=40))
    assert answer["choices"][0]["finish_reason"] == "length"
    assert "<|im_end|>" not in answer["choices"][0]["message"]["content"]


def test_a_chat_without_a_limit_may_fill_what_there_is(cluster: EchoCluster) -> None:
    _, _, answer = ask(cluster, "/v1/chat/completions", chat("abc", ignore_eos=True))
    assert answer["usage"]["total_tokens"] == 400  # the KV cache holds less than the model's length


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_limit(cluster: EchoCluster, limit: str) -> None:
    _, _, answer = ask(cluster, "/v1/chat/completions", {**chat("abc"), limit: 3})
    assert answer["usage"]["completion_tokens"] == 3


def test_content_parts_and_roles(cluster: EchoCluster) -> None:
    messages = [
        {"role": "developer", "content": "rule"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "x", "name": "bob"},
    ]
    body = {"messages": messages, "max_tokens": 100, "ignore_eos": True}
    _, _, answer = ask(cluster, "/v1/chat/completions", body)
    expected = "system\nrule\nuser\none\ntwo\nassistant\n\nuser\nx\nassistant\n"
    assert answer["choices"][0]["message"]["content"].startswith(expected)


def test_a_completion_has_openai_s_shape(cluster: EchoCluster) -> None:
    status, _, answer = ask(cluster, "/v1/completions", {"prompt": "abcd", "model": "echo"})
    assert status == 200
    assert answer["id"].startswith("cmpl-") and answer["object"] == "text_completion"
    [choice] = answer["choices"]
    assert choice["text"] == "abcd" * 4  # 16 tokens by default
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    assert answer["usage"] == usage_of(4, 16)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["aba"]),
        (["ab", "cd"], ["aba", "cdc"]),
        # Token 3 is the first of the byte-level alphabet, "!".
        ([3, 4], ['!"!']),
        ([[68, 69], [70]], ["bcb", "ddd"]),
    ],
)
def test_every_kind_of_prompt(cluster: EchoCluster, prompt: object, texts: list[str]) -> None:
    _, _, answer = ask(cluster, "/v1/completions", {"prompt": prompt, "max_tokens": 3})
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))


def test_choices_come_prompt_by_prompt(cluster: EchoCluster) -> None:
    body = {"prompt": ["abc", "xyz"], "n": 2, "max_tokens": 3}
    _, _, answer = ask(cluster, "/v1/completions", body)
    assert [choice["text"] for choice in answer["choices"]] == ["abc", "bca", "xyz", "yzx"]
    of_both = {"cached_tokens": 2 * echo_cached(3)}  # each prompt once, whatever the number of its choices
    assert answer["usage"] == {**usage_of(6, 12), "prompt_tokens_details": of_both}


def test_stop_strings_and_tokens(cluster: EchoCluster) -> None:
    _, _, answer = ask(cluster, "/v1/completions", {"prompt": "abcdef", "stop": "d"})
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("abc", "stop", "d")
    _, _, answer = ask(cluster, "/v1/completions", {"prompt": "abcdef", "stop": ["zz", "ef", "cde"]})
    assert answer["choices"][0]["text"] == "ab"
    _, _, answer = ask(cluster, "/v1/completions", {"prompt": [70, 71, 72], "stop_token_ids": [72]})
    [choice] = answer["choices"]
    assert (choice["finish_reason"], choice["stop_reason"], len(choice["text"])) == ("stop", 72, 2)


# --------------------------------------------------------------------------- streams


def test_a_chat_stream(cluster: EchoCluster) -> None:
    status, headers, data = ask(cluster, "/v1/chat/completions", chat("abc", max_tokens=6, stream=True))
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    chunks = events(data)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    content = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert content == "user\n"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert all("usage" not in chunk for chunk in chunks)


def test_a_token_without_text_sends_nothing(cluster: EchoCluster) -> None:
    body = {"prompt": "\N{GRINNING FACE}", "max_tokens": 40, "stream": True}  # a character of four tokens
    data = ask(cluster, "/v1/completions", body)[2]
    assert not [line for line in data.split(b"\n") if line.startswith(b":")]
    assert "".join(chunk["choices"][0]["text"] for chunk in events(data)) == "\N{GRINNING FACE}" * 10


def test_a_stream_ends_with_its_usage_if_asked(cluster: EchoCluster) -> None:
    body = {"prompt": "abc", "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(ask(cluster, "/v1/completions", body)[2])
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == usage_of(3, 4)


def test_a_stream_may_carry_its_usage_all_along(cluster: EchoCluster) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    body = {"prompt": "abc", "max_tokens": 4, "stream": True, "stream_options": options}
    chunks = events(ask(cluster, "/v1/completions", body)[2])
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] == 4


def test_a_stream_of_several_choices(cluster: EchoCluster) -> None:
    body = {"prompt": ["abc", "xyz"], "n": 2, "max_tokens": 5, "stream": True}
    texts: dict[int, str] = {}
    for chunk in events(ask(cluster, "/v1/completions", body)[2]):
        [choice] = chunk["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {0: "abcab", 1: "bcabc", 2: "xyzxy", 3: "yzxyz"}


def test_characters_are_whole_in_a_stream(cluster: EchoCluster) -> None:
    text = "né😀 "
    body = {"prompt": text, "max_tokens": 30, "stream": True}
    chunks = events(ask(cluster, "/v1/completions", body)[2])
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "\ufffd" not in "".join(pieces[:-1])
    assert (text * 10).startswith("".join(pieces[:-1]))


def test_64_streams_at_once(cluster: EchoCluster, api: openai.OpenAI) -> None:
    def stream(number: int) -> None:
        text = f"{number:03}|"
        chunks = api.completions.create(model="echo", prompt=text, max_tokens=100, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == text * 25

    with ThreadPoolExecutor(64) as threads:
        list(threads.map(stream, range(128)))


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        (CHAT, {}, "messages", "missing required field"),
        (CHAT, {"messages": []}, "messages", "at least one"),
        (CHAT, {"messages": "hi"}, "messages", "Expected `array`"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "got `int`"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "allowed: system"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
            "type text only",
        ),
        (CHAT, chat(max_tokens=0), "max_tokens", "at least 1"),
        (CHAT, chat(max_tokens="5"), "max_tokens", "Expected `int | null`, got `str`"),
        (CHAT, chat(max_tokens=2.5), "max_tokens", "got `float`"),
        (CHAT, chat(max_completion_tokens=-1), "max_completion_tokens", "at least 1"),
        (CHAT, chat(temperature=-0.1), "temperature", "from 0 to 2"),
        (CHAT, chat(temperature=2.1), "temperature", "from 0 to 2"),
        (CHAT, chat(top_p=0), "top_p", "above 0"),
        (CHAT, chat(top_p=1.1), "top_p", "at most 1"),
        (CHAT, chat(top_k=-2), "top_k", "at least 1"),
        (CHAT, chat(n=0), "n", "from 1 to 128"),
        (CHAT, chat(n=129), "n", "from 1 to 128"),
        (CHAT, chat(seed=2**64), "seed", "64-bit"),
        (CHAT, chat(seed="x"), "seed", "got `str`"),
        (CHAT, chat(stop=""), "stop", "1 to 4096"),
        (CHAT, chat(stop=["a"] * 17), "stop", "up to 16"),
        (CHAT, chat(stop=5), "stop", "got `int`"),
        (CHAT, chat(stream="yes"), "stream", "Expected `bool | null`"),
        (CHAT, chat(stream_options={"include_usage": True}), "stream_options", "stream: true"),
        (CHAT, chat(stop_token_ids=[-1]), "stop_token_ids", "token ids"),
        (CHAT, chat(tools=[{"type": "custom"}]), "tools[0].type", "allowed: function"),
        (CHAT, chat(tool_choice="required"), "tool_choice", "there are no tools"),
        (CHAT, chat(functions=[{}]), "functions", "not supported"),
        (CHAT, chat(modalities=["text", "audio"]), "modalities", "not supported"),
        (CHAT, chat("x" * 600), "messages", "maximum length of this model is 500"),
        (CHAT, chat("x" * 9000), "messages", "which are more than 500 tokens"),
        (TEXT, {"prompt": ["a", "x" * 9000]}, "prompt", "which are more than 500 tokens"),
        (CHAT, chat("x", max_tokens=490), "messages", "maximum length of this model is 500"),
        (CHAT, chat("x", max_tokens=450), "messages", "KV cache holds 400"),
        (CHAT, chat("x", max_tokens=10**30), "messages", "maximum length"),
        (TEXT, {}, "prompt", "missing required field"),
        (TEXT, {"prompt": ""}, "prompt", "empty"),
        (TEXT, {"prompt": []}, "prompt", "empty"),
        (TEXT, {"prompt": [[]]}, "prompt", "empty"),
        (TEXT, {"prompt": None}, "prompt", "got `null`"),
        (TEXT, {"prompt": {"a": 1}}, "prompt", "got `object`"),
        (TEXT, {"prompt": ["a", 1]}, "prompt", "mixes"),
        (TEXT, {"prompt": [1, [1]]}, "prompt", "mixes"),
        (TEXT, {"prompt": [[1], "a"]}, "prompt", "mixes"),
        (TEXT, {"prompt": [1.5]}, "prompt[0]", "got `float`"),
        (TEXT, {"prompt": [-1]}, "prompt", "negative"),
        (TEXT, {"prompt": [[70, 10**12]]}, "prompt", "too large"),
        (TEXT, {"prompt": [300]}, "prompt", "vocabulary of 300"),
        (TEXT, {"prompt": "x", "suffix": "y"}, "suffix", "not supported"),
        (TEXT, {"prompt": "x", "max_tokens": 400}, "prompt", "KV cache holds 400"),
    ],
)
def test_bad_requests_are_told_what_is_allowed(
    cluster: EchoCluster, path: str, body: dict[str, object], param: str, says: str
) -> None:
    status, headers, answer = ask(cluster, path, body)
    assert (status, headers["content-type"]) == (400, "application/json")
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert says in error["message"]
    if param != "stream_options":
        assert ask(cluster, path, {"stream": True, **body})[0] == 400


@pytest.mark.parametrize(
    "neutral",
    [
        {"tools": None, "tool_choice": "auto", "functions": []},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "modalities": ["text"]},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": {}},
        {"logprobs": False, "top_logprobs": 0, "min_p": 0, "min_tokens": 0},
        {"n": None, "stop": None, "seed": None, "temperature": None, "top_p": None, "top_k": None},
        {"stream": None, "stream_options": None, "max_tokens": 5, "stop_token_ids": None},
        {"user": "me", "metadata": {"a": "b"}, "store": False, "reasoning_effort": "low"},
        {
            "skip_special_tokens": True,
            "add_generation_prompt": True,
            "use_beam_search": False,
            "typical_p": 1,
        },
        {"top_k": -1, "seed": -5, "something_new": {"deep": [1, 2]}},
    ],
)
def test_neutral_and_unknown_fields_are_accepted(cluster: EchoCluster, neutral: dict[str, object]) -> None:
    assert ask(cluster, CHAT, {**chat("abc"), **neutral})[0] == 200


def test_neutral_fields_of_completions_are_accepted(cluster: EchoCluster) -> None:
    body = {"prompt": "abc", "echo": False, "suffix": None, "best_of": 2, "n": 2, "logprobs": None}
    assert ask(cluster, TEXT, body)[0] == 200


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"messages": [}', "invalid_json"),
        (b"[" * 100_000, None),
        (b'{"x":' + b"[" * 100_000, "invalid_json"),
        (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', "invalid_utf8"),
        (b'{"messages": [{"role": "user", "content": "\\ud800 x"}]}', "invalid_json"),
        (b'{"temperature": NaN}', "invalid_json"),
        (b"[]", None),
        (b"5", None),
        (b"\x00\x01\x02", "invalid_json"),
    ],
)
def test_bodies_that_are_no_request(cluster: EchoCluster, body: bytes, code: str | None) -> None:
    for path in (CHAT, TEXT):
        status, _, answer = ask(cluster, path, body)
        assert status == 400
        assert answer["error"]["code"] == code


def test_a_body_over_the_limit_is_refused(cluster: EchoCluster) -> None:
    status, _, answer = ask(cluster, CHAT, b" " * (16 * 1024 * 1024 + 1))
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    with socket.create_connection(("127.0.0.1", cluster.port), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        try:
            for _ in range(17):
                connection.sendall(chunk)
        except ConnectionError:
            pass
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_an_unknown_model_is_404(cluster: EchoCluster) -> None:
    for path, body in ((CHAT, chat(model="gpt-9")), (TEXT, {"prompt": "x", "model": "gpt-9"})):
        status, _, answer = ask(cluster, path, body)
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        assert "'echo'" in answer["error"]["message"]


def test_unknown_paths_and_methods_have_the_same_shape(cluster: EchoCluster) -> None:
    for method, path, status in (("GET", "/nowhere", 404), ("GET", CHAT, 405), ("POST", "/v1/models", 405)):
        found, _, answer = ask(cluster, path, method=method)
        assert found == status
        assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert ask(cluster, "/redoc", method="GET")[0] == 404


def test_bad_requests_leave_the_server_as_it_was(cluster: EchoCluster) -> None:
    assert ask(cluster, TEXT, {"prompt": "abc", "max_tokens": 4})[2]["choices"][0]["text"] == "abca"
    text = cluster.get("/metrics")[1].decode()
    assert 'phalanx_requests_live{model="echo"} 0.0' in text
    assert "exc_info" not in cluster.front_log.read_text()


# --------------------------------------------------------------------------- the rest


def test_request_ids_are_echoed(cluster: EchoCluster) -> None:
    _, headers, _ = ask(cluster, TEXT, {"prompt": "abc"}, headers={"X-Request-Id": "mine-1"})
    assert headers["x-request-id"] == "mine-1"
    _, headers, _ = ask(cluster, TEXT, {"prompt": ""})
    assert len(headers["x-request-id"]) == 32
    _, headers, _ = ask(cluster, TEXT, {"prompt": "abc", "stream": True}, headers={"x-request-id": "mine-2"})
    assert headers["x-request-id"] == "mine-2"


def test_models(cluster: EchoCluster) -> None:
    status, _, answer = ask(cluster, "/v1/models", method="GET")
    assert status == 200 and answer["object"] == "list"
    [model] = answer["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("echo", "model", 500)
    assert ask(cluster, "/v1/models/echo", method="GET")[2] == model
    assert ask(cluster, "/v1/models/other", method="GET")[0] == 404


def test_health(cluster: EchoCluster) -> None:
    assert ask(cluster, "/health", method="GET")[::2] == (200, b"")
    assert ask(cluster, "/health/live", method="GET")[::2] == (200, {"live": True})
    assert ask(cluster, "/health/ready", method="GET")[::2] == (200, {"ready": True, "epoch": 1})


def test_cluster_shows_worlds_and_ranks(cluster: EchoCluster) -> None:
    status, _, answer = ask(cluster, "/cluster", method="GET")
    assert status == 200
    [world] = answer["worlds"]
    assert (world["epoch"], world["state"], world["model"], world["tp"], world["pp"]) == (
        1,
        "active",
        "echo",
        1,
        1,
    )
    [rank] = world["ranks"]
    assert set(rank) >= {"rank", "tp", "pp", "host", "pid", "guard_pid", "state", "step", "heartbeat_age_s"}
    assert 0 <= rank["heartbeat_age_s"] < 2
    assert answer["faults"] == [] and answer["serving_epoch"] == 1


def test_metrics_are_well_formed_and_count(cluster: EchoCluster) -> None:
    def sample(name: str, **labels: str) -> float:
        text = cluster.get("/metrics")[1].decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return sample.value
        raise AssertionError(f"no {name}")

    before = sample("phalanx_generation_tokens_total")
    ask(cluster, TEXT, {"prompt": "abc", "max_tokens": 7})
    assert sample("phalanx_generation_tokens_total") == before + 7
    assert sample("vllm:generation_tokens_total", model_name="echo", engine="0") == before + 7
    assert sample("vllm:request_success_total", finished_reason="length") >= 1
    assert sample("phalanx_serving_epoch") == 1
    assert sample("vllm:num_requests_waiting") == 0
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        assert sample(f"phalanx_{name}_count") == sample(f"vllm:{name}_count") > 0
        assert sample(f"phalanx_{name}_bucket", le="+Inf") == sample(f"phalanx_{name}_count")
    assert sample("phalanx_http_responses_total", status="200") > 0
