"""OpenAI's responses over an echo world: shapes, typed events, taking up again, and what is refused by name."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.echo_world import EchoCluster, echo_cached
from tests.unit.http_asking import CHAT, ask

PATH = "/v1/responses"
TEXT = "user\nabc"
"""What the echo answers to "abc": the beginning of its own prompt; <|im_start|> has no text."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    options = ("--max-model-len", "2000")
    with EchoCluster(tmp_path_factory.mktemp("run"), step_s=0.002, world_options=options) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


def typed_events(data: bytes) -> list[dict[str, Any]]:
    """The events of a stream, checked for their frame."""
    events = []
    for part in data.split(b"\n\n")[:-1]:
        first, second = [line for line in part.split(b"\n") if not line.startswith(b":")]
        event = json.loads(second.removeprefix(b"data: "))
        assert first == b"event: " + event["type"].encode()
        events.append(event)
    return events


def long_one(**fields: object) -> dict[str, object]:
    """A response that takes some 0.4 s and more."""
    return {"input": "abc", "max_output_tokens": 120, "ignore_eos": True, **fields}


def test_a_response_has_openai_s_shape(cluster: EchoCluster) -> None:
    body = {"model": "echo", "input": "abc", "max_output_tokens": 9, "metadata": {"a": "b"}, "user": "me"}
    status, headers, answer = ask(cluster, PATH, body)
    assert status == 200 and answer["id"].startswith("resp_") and answer["object"] == "response"
    assert headers["x-phalanx-request-id"] == answer["id"]
    assert answer["status"] == "incomplete" and answer["incomplete_details"] == {
        "reason": "max_output_tokens"
    }
    [item] = answer["output"]
    part = {"type": "output_text", "text": TEXT, "annotations": [], "logprobs": []}
    assert item["content"] == [part] and (item["type"], item["role"]) == ("message", "assistant")
    assert (answer["metadata"], answer["user"], answer["error"]) == ({"a": "b"}, "me", None)
    usage = answer["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (22, 9, 31)
    assert usage["input_tokens_details"]["cached_tokens"] == echo_cached(22)
    assert (answer["max_output_tokens"], answer["temperature"], answer["truncation"]) == (9, 1.0, "disabled")


def test_one_that_ends_by_itself_is_completed(cluster: EchoCluster) -> None:
    answer = ask(cluster, PATH, {"input": "abc"})[2]
    assert answer["status"] == answer["output"][0]["status"] == "completed"
    assert answer["incomplete_details"] is None and answer["completed_at"] >= answer["created_at"]


def test_it_is_the_chat_of_its_items(cluster: EchoCluster) -> None:
    items = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "yes?"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "user", "content": "abc"},
    ]
    body = {"input": items, "instructions": "You are old.", "seed": 5, "max_output_tokens": 150, "top_p": 0.5}
    answer = ask(cluster, PATH, body)[2]
    messages = [
        {"role": "system", "content": "You are old."},
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "abc"},
    ]
    same = ask(cluster, CHAT, {"messages": messages, "max_tokens": 150, "ignore_eos": False})[2]
    assert answer["output"][0]["content"][0]["text"] == same["choices"][0]["message"]["content"]
    assert answer["usage"]["input_tokens"] == same["usage"]["prompt_tokens"]


def test_a_stream_tells_the_response_in_typed_events(cluster: EchoCluster) -> None:
    events = typed_events(ask(cluster, PATH, {"input": "abc", "stream": True})[2])
    kinds = [event["type"].removeprefix("response.") for event in events]
    num_deltas = len(kinds) - 8
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *(["output_text.delta"] * num_deltas),
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    deltas = [event["delta"] for event in events if "delta" in event]
    [done] = [event for event in events if event["type"] == "response.output_text.done"]
    assert "".join(deltas) == done["text"] and done["text"].startswith(TEXT)
    last = events[-1]["response"]
    assert last["output"] == [events[-2]["item"]] and last["usage"]["output_tokens"] == 10
    whole = ask(cluster, f"{PATH}/{last['id']}", method="GET")[2]
    assert whole == last


def test_a_stream_is_taken_up_behind_any_event(cluster: EchoCluster) -> None:
    data = ask(cluster, PATH, long_one(stream=True))[2]
    events = typed_events(data)
    path = f"{PATH}/{events[0]['response']['id']}"
    assert ask(cluster, f"{path}?stream=true", method="GET")[2] == data
    for after in (0, 3, 17, len(events) - 2, len(events) - 1, len(events) + 5):
        rest = ask(cluster, f"{path}?stream=true&starting_after={after}", method="GET")[2]
        assert typed_events(rest) == events[after + 1 :]
    for wrong in ("x", "-1", "1.5", "9" * 20):
        status, _, answer = ask(cluster, f"{path}?stream=true&starting_after={wrong}", method="GET")
        assert (status, answer["error"]["param"]) == (400, "starting_after")


def test_log_probabilities_come_with_their_text(cluster: EchoCluster) -> None:
    body = {"input": "abc", "top_logprobs": 2, "include": ["message.output_text.logprobs"]}
    [part] = ask(cluster, PATH, body)[2]["output"][0]["content"]
    assert len(part["logprobs"]) == 10 and len(part["logprobs"][0]["top_logprobs"]) == 2
    events = typed_events(ask(cluster, PATH, {**body, "stream": True})[2])
    [done] = [event for event in events if event["type"] == "response.output_text.done"]
    assert done["logprobs"] == part["logprobs"]


def test_structured_output_comes_by_the_text_format(cluster: EchoCluster) -> None:
    wanted = {"type": "json_schema", "name": "x", "schema": {"type": "object", "$ref": "#/nowhere"}}
    status, _, answer = ask(cluster, PATH, {"input": "abc", "text": {"format": wanted}})
    assert status == 400 and answer["error"]["param"] == "text.format.schema"
    wanted["schema"] = {"type": "object", "properties": {"a": {"type": "string"}}}
    answer = ask(cluster, PATH, {"input": "abc", "text": {"format": wanted}})[2]
    assert answer["text"]["format"] == wanted
    assert ask(cluster, PATH, {"input": "abc", "text": {"format": {"type": "json_object"}}})[0] == 200


# --------------------------------------------------------------------------- in the background, and stored


def test_one_in_the_background_is_asked_for(cluster: EchoCluster) -> None:
    first = ask(cluster, PATH, long_one(background=True))[2]
    assert first["status"] in ("queued", "in_progress") and first["usage"] is None
    path = f"{PATH}/{first['id']}"
    cluster.wait(lambda: ask(cluster, path, method="GET")[2]["status"] == "incomplete")
    answer = ask(cluster, path, method="GET")[2]
    assert answer["background"] and answer["usage"]["output_tokens"] == 120


def test_a_stream_in_the_background_outlives_its_client(cluster: EchoCluster) -> None:
    connection = socket.create_connection(("127.0.0.1", cluster.port), timeout=30)
    body = json.dumps(long_one(background=True, stream=True)).encode()
    head = b"POST /v1/responses HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    connection.sendall(head + body)
    data = b""
    while data.count(b"event: ") < 10:
        data += connection.recv(65536)
    connection.close()
    begun = json.loads(data.split(b"data: ")[1].split(b"\n")[0])
    path = f"{PATH}/{begun['response']['id']}"
    cluster.wait(lambda: ask(cluster, path, method="GET")[2]["status"] == "incomplete")
    events = typed_events(ask(cluster, f"{path}?stream=true", method="GET")[2])
    assert [event["type"] for event in events[:3]] == [
        "response.created",
        "response.queued",
        "response.in_progress",
    ]
    assert events[-1]["response"]["usage"]["output_tokens"] == 120


def test_one_is_cancelled(cluster: EchoCluster) -> None:
    body = long_one(background=True, max_output_tokens=400)
    path = f"{PATH}/{ask(cluster, PATH, body)[2]['id']}"
    status, _, answer = ask(cluster, f"{path}/cancel")
    assert (status, answer["status"]) == (200, "cancelled")
    assert ask(cluster, path, method="GET")[2]["status"] == "cancelled"
    events = typed_events(ask(cluster, f"{path}?stream=true", method="GET")[2])
    assert events[-1]["type"] == "response.incomplete" and events[-1]["response"]["status"] == "cancelled"
    assert ask(cluster, f"{path}/cancel")[2]["status"] == "cancelled"


def test_one_is_deleted(cluster: EchoCluster) -> None:
    for body in ({"input": "abc"}, long_one(background=True, max_output_tokens=400)):
        path = f"{PATH}/{ask(cluster, PATH, body)[2]['id']}"
        status, _, answer = ask(cluster, path, method="DELETE")
        assert (status, answer["deleted"], answer["object"]) == (200, True, "response")
        for method, rest in (("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")):
            status, _, answer = ask(cluster, path + rest, method=method)
            assert (status, answer["error"]["code"]) == (404, "response_not_found")


def test_what_is_not_stored_is_not_found(cluster: EchoCluster) -> None:
    answer = ask(cluster, PATH, {"input": "abc", "store": False})[2]
    assert answer["store"] is False and answer["status"] == "completed"
    assert ask(cluster, f"{PATH}/{answer['id']}", method="GET")[0] == 404
    body = {"input": "x", "previous_response_id": answer["id"]}
    status, _, refused = ask(cluster, PATH, body)
    assert (status, refused["error"]["code"]) == (400, "previous_response_not_found")


def test_a_conversation_goes_on_from_a_stored_response(cluster: EchoCluster) -> None:
    first = ask(cluster, PATH, {"input": "abc", "instructions": "Old."})[2]
    said = first["output"][0]["content"][0]["text"]
    second = ask(cluster, PATH, {"input": "more", "previous_response_id": first["id"]})[2]
    messages = [
        {"role": "user", "content": "abc"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "more"},
    ]
    same = ask(cluster, CHAT, {"messages": messages})[2]
    assert second["usage"]["input_tokens"] == same["usage"]["prompt_tokens"]
    assert second["previous_response_id"] == first["id"]
    items = ask(cluster, f"{PATH}/{second['id']}/input_items?order=asc", method="GET")[2]
    assert [item["content"][0]["text"] for item in items["data"]] == ["abc", said, "more"]
    assert items["data"][1]["id"] == first["output"][0]["id"] and items["has_more"] is False
    page = ask(cluster, f"{PATH}/{second['id']}/input_items?limit=2", method="GET")[2]
    assert page["has_more"] and [item["content"][0]["text"] for item in page["data"]] == ["more", said]
    path = f"{PATH}/{second['id']}/input_items?limit=2&after={page['last_id']}"
    page = ask(cluster, path, method="GET")[2]
    assert [item["content"][0]["text"] for item in page["data"]] == ["abc"] and not page["has_more"]
    running = ask(cluster, PATH, long_one(background=True))[2]
    status, _, refused = ask(cluster, PATH, {"input": "x", "previous_response_id": running["id"]})
    assert status == 400 and "still in progress" in refused["error"]["message"]


def test_truncation_lets_the_oldest_messages_go(cluster: EchoCluster) -> None:
    items = [{"role": "user", "content": f"{number} " + "x" * 200} for number in range(12)]
    body = {"input": items, "instructions": "Old.", "max_output_tokens": 40}
    status, _, answer = ask(cluster, PATH, body)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert answer["error"]["param"] == "input"
    answer = ask(cluster, PATH, {**body, "truncation": "auto"})[2]
    tokens = [
        ask(cluster, "/tokenize", {"messages": [{"role": "system", "content": "Old."}, *items[count:]]})[2]["count"]
        for count in range(12)
    ]  # fmt: skip
    assert answer["usage"]["input_tokens"] == max(count for count in tokens if count + 40 <= 2000)
    body["input"] = [{"role": "user", "content": "x" * 2600}]
    assert ask(cluster, PATH, {**body, "truncation": "auto"})[0] == 400


def test_the_same_key_is_the_same_response(cluster: EchoCluster) -> None:
    headers = {"idempotency-key": "responses-1"}
    first = ask(cluster, PATH, {"input": "abc", "temperature": 2}, headers=headers)[2]
    assert ask(cluster, PATH, {"temperature": 2, "input": "abc"}, headers=headers)[2] == first
    assert ask(cluster, PATH, {"input": "abd"}, headers=headers)[0] == 422


# --------------------------------------------------------------------------- what kills


@pytest.mark.slow
def test_streams_and_background_outlive_world_and_front(cluster: EchoCluster) -> None:
    undisturbed = ask(cluster, PATH, long_one(seed=1))[2]["output"][0]["content"][0]["text"]
    running = ask(cluster, PATH, long_one(background=True, seed=1))[2]
    path = f"{PATH}/{running['id']}"
    cluster.wait(lambda: bool(ask(cluster, path, method="GET")[2]["output"]))
    before = typed_events(ask(cluster, f"{path}?stream=true", method="GET")[2])
    running = ask(cluster, PATH, long_one(background=True, seed=1))[2]
    path = f"{PATH}/{running['id']}"
    cluster.wait(lambda: bool(ask(cluster, path, method="GET")[2]["output"]))
    cluster.kill_world()
    cluster.start_world()
    cluster.restart_front()
    cluster.wait_serving(cluster.epoch)
    after = typed_events(ask(cluster, f"{path}?stream=true&starting_after=9", method="GET")[2])
    assert [event["sequence_number"] for event in after] == list(range(10, len(before)))
    assert [event.get("delta") for event in after] == [event.get("delta") for event in before[10:]]
    assert after[-1]["response"]["output"][0]["content"][0]["text"] == undisturbed


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"input": []}, "input", "at least one item"),
        ({"input": None}, "input", "Expected"),
        ({"input": [{"role": "judge", "content": "x"}]}, "input[0].role", "user, assistant"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type", "input_"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type", "input_"),
        ({"input": [{"type": "computer_call_output"}]}, "input[0].type", "computer_call_output"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "allowed: message"),
        ({"input": [{"type": "function_call", "call_id": "x"}]}, "input[0].name", "string"),
        ({"input": [{"role": "user", "content": "x", "id": 5}]}, "input[0].id", "string of up to 128"),
        ({"input": [{"type": "reasoning", "content": [{"type": "x"}]}]}, "input[0].content[0]", "reasoning_text"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content", "string or a list"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'web_search' is not supported"),
        ({"tools": [{"type": "file_search"}]}, "tools[0].type", "allowed: function"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "missing"),
        ({"include": ["reasoning.encrypted_content"]}, "include", "not supported"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens is 0; allowed: at least 1"),
        ({"temperature": 3}, "temperature", "from 0 to 2"),
        ({"top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"truncation": "some"}, "truncation", "auto, disabled"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "medium"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type", "json_schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "missing"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "allowed: auto"),
        ({"service_tier": "flex"}, "service_tier", "auto, default"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata", "up to 16"),
        ({"metadata": {"x": "x" * 513}}, "metadata", "up to 512"),
        ({"background": True, "store": False}, "background", "store: true"),
        ({"stream_options": {}}, "stream_options", "stream: true"),
        ({"conversation": "conv_1"}, "conversation", "not supported"),
        ({"prompt": {"id": "x"}}, "prompt", "not supported"),
        ({"previous_response_id": "resp_x"}, "previous_response_id", "not found"),
    ],
)  # fmt: skip
def test_what_is_refused(cluster: EchoCluster, fields: dict[str, Any], param: str, says: str) -> None:
    status, _, answer = ask(cluster, PATH, {"input": "abc", **fields})
    assert status == 400, answer
    assert answer["error"]["param"] == param and says in answer["error"]["message"], answer


# --------------------------------------------------------------------------- tools

TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}}


def test_calls_of_tools_are_items(cluster: EchoCluster) -> None:
    # The echo gives the prompt back, which describes how a call is written.
    body = {"input": "Weather?", "tools": [TOOL]}
    answer = ask(cluster, PATH, body)[2]
    call = next(item for item in answer["output"] if item["type"] == "function_call")
    assert (call["name"], json.loads(call["arguments"])) == ("function_name", {"parameter": "value"})
    assert call["status"] == "completed" and call["call_id"] and call["id"].startswith("fc_")
    events = typed_events(ask(cluster, PATH, {**body, "stream": True})[2])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events if event.get("output_index") == answer["output"].index(call)]
    assert kinds[0] == "response.output_item.added" and kinds[-1] == "response.output_item.done"
    arguments = [event for event in events if event["type"] == "response.function_call_arguments.delta"]
    [done] = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert "".join(event["delta"] for event in arguments) == done["arguments"] == call["arguments"]
    last = events[-1]["response"]
    assert [item["type"] for item in last["output"]] == [item["type"] for item in answer["output"]]
    for after in (len(events) // 3, events.index(arguments[1])):
        path = f"{PATH}/{last['id']}?stream=true&starting_after={after}"
        assert typed_events(ask(cluster, path, method="GET")[2]) == events[after + 1 :]


def test_numbers_of_any_size_are_told_again(cluster: EchoCluster) -> None:
    tool = {**TOOL, "parameters": {"type": "object", "properties": {"n": {"maximum": 2**70}}}}
    answer = ask(cluster, PATH, {"input": "x", "tools": [tool], "max_output_tokens": 5})[2]
    assert answer["tools"][0]["parameters"] == tool["parameters"]


def test_a_conversation_with_calls_is_the_chat_s(cluster: EchoCluster) -> None:
    items = [
        {"role": "user", "content": "Weather in Rome?"},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "Sun."},
    ]
    messages = [
        items[0],
        {
            "role": "assistant",
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
    answer = ask(cluster, PATH, {"input": items})[2]
    same = ask(cluster, CHAT, {"messages": messages})[2]
    assert answer["usage"]["input_tokens"] == same["usage"]["prompt_tokens"]
    assert answer["output"][0]["content"][0]["text"] == same["choices"][0]["message"]["content"]
    status, _, refused = ask(
        cluster, PATH, {"input": "x", "tool_choice": {"type": "web_search"}, "tools": [TOOL]}
    )
    assert status == 400 and refused["error"]["param"] == "tool_choice"
