"""Tool calls over HTTP, on an echo world: the model's text is the prompt's, which describes how a call is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.echo_world import EchoCluster
from tests.unit.http_asking import CHAT, TEXT, ask, chat, events, events_with_ids

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALLED = [("function_name", {"parameter": "value"})]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    options = ("--max-model-len", "4000")
    with EchoCluster(tmp_path_factory.mktemp("run"), step_s=0.0005, world_options=options) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


def accumulated(chunks: list[Any], index: int = 0) -> tuple[str, list[dict[str, Any]], str | None]:
    """Content, calls and finish reason of a stream, as OpenAI's client puts them together."""
    content, calls, reason = "", [], None
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            content += choice["delta"].get("content") or ""
            for delta in choice["delta"].get("tool_calls", ()):
                if delta["index"] == len(calls):
                    assert delta["id"] and delta["type"] == "function" and delta["function"]["name"]
                    calls.append({"id": delta["id"], **delta["function"]})
                else:
                    assert delta.keys() == {"index", "function"} and delta["function"].keys() == {"arguments"}
                    calls[delta["index"]]["arguments"] += delta["function"]["arguments"]
            reason = choice["finish_reason"] or reason
    return content, calls, reason


def test_calls_are_found_in_an_answer_and_in_its_stream(cluster: EchoCluster) -> None:
    asked = chat("Weather?", tools=TOOLS, n=2, seed=1)
    answer = ask(cluster, CHAT, asked)[2]
    chunks = events(ask(cluster, CHAT, {**asked, "stream": True})[2])
    for choice in answer["choices"]:
        message = choice["message"]
        assert choice["finish_reason"] == "tool_calls"
        assert "You may call functions" in message["content"] and "<tool_call>" not in message["content"]
        found = [
            (call["function"]["name"], json.loads(call["function"]["arguments"]))
            for call in message["tool_calls"]
        ]
        assert found == CALLED
        content, calls, reason = accumulated(chunks, choice["index"])
        assert (content, reason) == (message["content"], "tool_calls")
        assert [(call["name"], json.loads(call["arguments"])) for call in calls] == CALLED
    ids = {call["id"] for choice in answer["choices"] for call in choice["message"]["tool_calls"]}
    assert len(ids) == 2


def test_a_stream_is_taken_up_within_a_call(cluster: EchoCluster) -> None:
    status, headers, data = ask(cluster, CHAT, chat("Weather?", tools=TOOLS, stream=True))
    assert status == 200
    parts = events_with_ids(data)
    whole = [json.loads(content) for _, content in parts]
    path = f"/v1/requests/{headers['x-phalanx-request-id']}/stream"
    for at in range(0, len(parts), max(1, len(parts) // 40)):
        rest = events(ask(cluster, path, method="GET", headers={"last-event-id": parts[at][0]})[2])
        assert accumulated(whole[: at + 1] + rest) == accumulated(whole)


def test_a_call_that_the_limit_cuts_off_is_returned(cluster: EchoCluster) -> None:
    text = ask(cluster, CHAT, chat("Weather?", tools=TOOLS, tool_choice="none"))[2]["choices"][0]["message"][
        "content"
    ]
    assert "<tool_call>" not in text  # they are not even described
    for limit in range(330, 480, 3):
        choice = ask(cluster, CHAT, chat("Weather?", tools=TOOLS, max_tokens=limit))[2]["choices"][0]
        assert choice["finish_reason"] == "length"
        calls = choice["message"].get("tool_calls")
        if calls and not calls[0]["function"]["arguments"].endswith("}"):
            assert '{"parameter": "value"}'.startswith(calls[0]["function"]["arguments"])
            return
    raise AssertionError("no limit cut the call off")


def test_the_conversation_of_a_call_is_shown_to_the_model(cluster: EchoCluster) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Weather in Rome?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "Sun."},
    ]
    answer = ask(cluster, "/tokenize", {"messages": messages})[2]
    text = ask(cluster, "/detokenize", {"tokens": answer["tokens"]})[2]["prompt"]
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>' in text
    assert "user\n<tool_response>\nSun.\n</tool_response>" in text
    status, _, refused = ask(cluster, CHAT, {"messages": [{"role": "tool", "content": "x"}]})
    assert (status, refused["error"]["param"]) == (400, "messages[0].tool_call_id")


def test_a_final_message_is_continued(cluster: EchoCluster) -> None:
    messages = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It is"}]
    body = {"messages": messages, "continue_final_message": True}
    tokens = ask(cluster, "/tokenize", body)[2]["tokens"]
    assert ask(cluster, "/detokenize", {"tokens": tokens})[2]["prompt"].endswith("assistant\nIt is")
    assert ask(cluster, CHAT, body)[0] == 200
    status, _, refused = ask(cluster, CHAT, {**body, "add_generation_prompt": True})
    assert (status, refused["error"]["param"]) == (400, "continue_final_message")


def test_what_users_of_vllm_send(cluster: EchoCluster) -> None:
    def text(**fields: object) -> str:
        return str(
            ask(cluster, TEXT, {"prompt": "hello world", "max_tokens": 9, **fields})[2]["choices"][0]["text"]
        )

    assert text(stop="wor") == "hello "
    assert text(stop="wor", include_stop_str_in_output=True) == "hello wor"
    assert text(truncate_prompt_tokens=3, max_tokens=3) == "rld"
    assert text(truncate_prompt_tokens=-1, max_tokens=2) == "hello w"
    special = {"prompt": [1, 70, 71], "max_tokens": 3}
    plain = ask(cluster, TEXT, special)[2]["choices"][0]["text"]
    shown = ask(cluster, TEXT, {**special, "skip_special_tokens": False})[2]["choices"][0]["text"]
    assert shown == "<|im_start|>" + plain


def test_efforts_reach_the_template_or_nobody(cluster: EchoCluster) -> None:
    for effort in ("none", "high"):
        assert ask(cluster, CHAT, chat("x", reasoning_effort=effort, include_reasoning=False))[0] == 200
