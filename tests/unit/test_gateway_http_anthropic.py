"""/v1/messages on an echo world: blocks, events, errors, and streams that are taken up again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.echo_world import EchoCluster, echo_cached
from tests.unit.http_asking import ask

MESSAGES = "/v1/messages"
TOOLS = [{"name": "weather", "input_schema": {"type": "object", "properties": {}}}]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    options = ("--max-model-len", "4000")
    with EchoCluster(tmp_path_factory.mktemp("run"), step_s=0.0005, world_options=options) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


def body(text: str = "hello", **fields: object) -> dict[str, object]:
    return {"model": "echo", "max_tokens": 3000, "messages": [{"role": "user", "content": text}], **fields}


def events_of(data: bytes) -> list[tuple[str | None, dict[str, Any]]]:
    """Id, if it has one, and data of each event; its name is checked."""
    found = []
    for part in data.split(b"\n\n")[:-1]:
        lines = dict(line.split(b": ", 1) for line in part.split(b"\n"))
        event = json.loads(lines[b"data"])
        assert lines[b"event"].decode() == event["type"]
        found.append((lines[b"id"].decode() if b"id" in lines else None, event))
    return found


def accumulated(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that Anthropic's client makes of a stream's events."""
    events = json.loads(json.dumps(events))
    assert events[0]["type"] == "message_start" and events[-1]["type"] == "message_stop"
    message = events[0]["message"]
    is_open = False
    for event in events[1:-1]:
        if event["type"] == "content_block_start":
            assert not is_open and event["index"] == len(message["content"])
            is_open = True
            message["content"].append({**event["content_block"], "json": ""})
        elif event["type"] == "content_block_delta":
            block = message["content"][event["index"]]
            assert is_open and event["index"] == len(message["content"]) - 1
            delta = event["delta"]
            if delta["type"] == "text_delta":
                block["text"] += delta["text"]
            else:
                block["json"] += delta["partial_json"]
        elif event["type"] == "content_block_stop":
            is_open = False
            block = message["content"][event["index"]]
            written = block.pop("json")
            if block["type"] == "tool_use":
                block["input"] = json.loads(written)
        elif event["type"] == "message_delta":
            message.update(event["delta"])
            message["usage"] = event["usage"]
        else:
            assert event["type"] == "ping"
    assert not is_open
    return dict(message)


def test_a_stream_brings_what_a_whole_message_brings(cluster: EchoCluster) -> None:
    asked = body("Weather?", tools=TOOLS)
    status, _, whole = ask(cluster, MESSAGES, asked)
    assert status == 200 and (whole["type"], whole["role"]) == ("message", "assistant")
    text, use = whole["content"][0], whole["content"][1]
    assert text["type"] == "text" and "<tool_call>" not in text["text"]
    assert (use["type"], use["name"], use["input"]) == ("tool_use", "function_name", {"parameter": "value"})
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("tool_use", None)
    streamed = accumulated(
        [event for _, event in events_of(ask(cluster, MESSAGES, {**asked, "stream": True})[2])]
    )
    for message in (whole, streamed):
        for block in message["content"]:
            block.pop("id", None)
        message.pop("id")
    assert streamed == whole


def test_a_stream_is_taken_up_at_each_of_its_events(cluster: EchoCluster) -> None:
    _, headers, data = ask(cluster, MESSAGES, body("Weather?", tools=TOOLS, stream=True))
    whole = events_of(data)
    expected = accumulated([event for _, event in whole])
    path = f"/v1/requests/{headers['x-phalanx-request-id']}/stream"
    named = [at for at, (event_id, _) in enumerate(whole) if event_id is not None][:-1]
    for at in named[:: max(1, len(named) // 30)]:
        event_id = whole[at][0]
        assert event_id is not None
        rest = events_of(ask(cluster, path, method="GET", headers={"last-event-id": event_id})[2])
        again = json.loads(json.dumps([event for _, event in whole[: at + 1] + rest]))
        assert accumulated(again) == expected


def test_why_it_stopped(cluster: EchoCluster) -> None:
    def stopped(**fields: object) -> tuple[str, str | None]:
        answer = ask(cluster, MESSAGES, body("abcdef", **fields))[2]
        return answer["stop_reason"], answer["stop_sequence"]

    assert stopped() == ("end_turn", None)
    assert stopped(max_tokens=3) == ("max_tokens", None)
    assert stopped(stop_sequences=["cd"]) == ("stop_sequence", "cd")


def test_tokens_are_counted_as_they_are_used(cluster: EchoCluster) -> None:
    asked = body(
        "Weather?",
        system=[{"type": "text", "text": "Be brief."}],
        tools=TOOLS,
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": ""},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "t1",
                        "content": [{"type": "text", "text": "Sun."}],
                    },
                    {"type": "text", "text": "And now?"},
                ],
            },
        ],
    )
    answer = ask(cluster, MESSAGES, {**asked, "max_tokens": 1})[2]
    counted = ask(cluster, f"{MESSAGES}/count_tokens", asked)[2]
    usage, prompt = answer["usage"], counted["input_tokens"]
    assert usage["cache_read_input_tokens"] == echo_cached(prompt) > 0
    assert usage["input_tokens"] == prompt - echo_cached(prompt)


@pytest.mark.parametrize(
    ("fields", "status", "kind", "says"),
    [
        ({"model": "claude"}, 404, "not_found_error", "does not exist"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "at least 1"),
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"messages": []}, 400, "invalid_request_error", "empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error", "'image'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, 400, "invalid_request_error", "tools"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "no tools"),
        ({"tool_choice": {"type": "x"}}, 400, "invalid_request_error", "auto, any, tool, none"),
        ({"thinking": {"type": "x"}}, 400, "invalid_request_error", "enabled"),
        ({"stop_sequences": [""]}, 400, "invalid_request_error", "stop_sequences"),
        ({"mcp_servers": [{"type": "url"}]}, 400, "invalid_request_error", "mcp_servers"),
        ({"container": "c"}, 400, "invalid_request_error", "container"),
        ({"context_management": {"edits": [1]}}, 400, "invalid_request_error", "context_management"),
        ({"compaction": {"type": "x"}}, 400, "invalid_request_error", "compaction"),
        ({"fallbacks": ["x"]}, 400, "invalid_request_error", "fallbacks"),
        ({"thread": {"id": "x"}}, 400, "invalid_request_error", "thread"),
        ({"output_config": {"format": 5}}, 400, "invalid_request_error", "json_schema"),
    ],
)  # fmt: skip
def test_errors_are_in_anthropic_s_shape(
    cluster: EchoCluster, fields: dict[str, Any], status: int, kind: str, says: str
) -> None:
    found, _, answer = ask(cluster, MESSAGES, body(**fields))
    assert (found, answer["type"], answer["error"]["type"]) == (status, "error", kind)
    assert says in answer["error"]["message"]


def test_the_answer_goes_on_with_the_assistant_s_words(cluster: EchoCluster) -> None:
    plain = body("Say.")
    assert isinstance(plain["messages"], list)
    words = {"role": "assistant", "content": "It is"}
    with_words = {**plain, "messages": [*plain["messages"], words]}
    counts = [ask(cluster, f"{MESSAGES}/count_tokens", one)[2]["input_tokens"] for one in (plain, with_words)]
    assert counts[1] == counts[0] + len("It is")  # no end of turn behind them
