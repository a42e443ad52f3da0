"""Every field that the types of the `anthropic` package define for a message is honoured, taken as a hint, or refused
by name. The package has an environment of its own: its fields are written down here, and compared there."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.client_environments import client_environment
from tests.echo_world import EchoCluster
from tests.unit.http_asking import ask

PACKAGE = "anthropic==2.12.0"
MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
QUESTION = {"role": "user", "content": "hi"}
BODY = {"model": "echo", "max_tokens": 2, "messages": [QUESTION]}
TOOL = {"name": "look", "input_schema": {"type": "object", "properties": {}}}
CACHE = {"type": "ephemeral"}
USE = {"type": "tool_use", "id": "t1", "name": "look", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "t1"}

ACCEPTED: dict[str, Any] = {
    "max_tokens": 3,
    "messages": [QUESTION],
    "model": "echo",
    "output_config": {"effort": "low"},
    "stop_sequences": ["x"],
    "stream": True,
    "system": [{"type": "text", "text": "Be brief.", "cache_control": CACHE}],
    "thinking": {"type": "disabled"},
    "tool_choice": {"type": "auto"},
    "tools": [TOOL],
    # Hints, and where and for whom a message is made: they change no answer.
    "cache_control": CACHE,
    "diagnostics": {"previous_message_id": None},
    "inference_geo": "eu",
    "metadata": {"user_id": "a"},
    "service_tier": "auto",
    "speed": "fast",
    "user_profile_id": "a",
    "workspace_id": "a",
    "metadata.user_id": "a",
    "output_config.effort": "high",
    "output_config.format": {"type": "json_schema", "schema": {"type": "object"}},
    "thinking.budget_tokens": 1024,
    "thinking.display": "summarized",
    "thinking.type": "adaptive",
    "tool_choice.disable_parallel_tool_use": True,
    "tool_choice.name": "look",
    "tool_choice.type": "none",
    "tools.cache_control": CACHE,
    "tools.description": "Looks.",
    "tools.eager_input_streaming": True,
    "tools.input_schema": {"type": "object"},
    "tools.name": "see",
    "tools.strict": True,
    "tools.type": "custom",
    "text.cache_control": CACHE,
    "text.citations": [],
    "text.text": "more",
    "text.type": "text",
    "tool_use.cache_control": CACHE,
    "tool_use.caller": {"type": "direct"},
    "tool_use.id": "t1",
    "tool_use.input": {"a": 1},
    "tool_use.name": "look",
    "tool_use.toolset_name": None,
    "tool_use.type": "tool_use",
    "tool_result.cache_control": CACHE,
    "tool_result.content": "nothing there",
    "tool_result.is_error": True,
    "tool_result.tool_use_id": "t1",
    "tool_result.toolset_name": None,
    "tool_result.type": "tool_result",
}

REFUSED: dict[str, Any] = {
    "container": {"id": "c"},
    "output_config.format": {"type": "xml"},
    "thinking.type": "between_tools",
    "tools.allowed_callers": ["code_execution_20260120"],
    "tools.defer_loading": True,
    "tools.input_examples": [{"a": 1}],
    "tools.type": "web_search_20250305",
    "text.type": "image",
}
"""Values that ask for what is not served: a 400 that names the field."""

ONLY_MESSAGES = {
    "container",
    "diagnostics",
    "inference_geo",
    "max_tokens",
    "metadata",
    "service_tier",
    "stop_sequences",
    "stream",
}
"""What the count of tokens does not have."""

WALK = """
import json, typing
from anthropic import types
from anthropic.types import message_create_params, message_count_tokens_params

def fields(*kinds):
    return sorted({name.rstrip("_") for kind in kinds for name in typing.get_type_hints(kind)})

print(json.dumps({
    "": fields(message_create_params.MessageCreateParamsStreaming),
    "count": fields(message_count_tokens_params.MessageCountTokensParams),
    "metadata.": fields(types.MetadataParam),
    "output_config.": fields(types.OutputConfigParam),
    "thinking.": fields(*typing.get_args(types.ThinkingConfigParam)),
    "tool_choice.": fields(*typing.get_args(types.ToolChoiceParam)),
    "tools.": fields(types.ToolParam),
    "text.": fields(types.TextBlockParam),
    "tool_use.": fields(types.ToolUseBlockParam),
    "tool_result.": fields(types.ToolResultBlockParam),
}))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    with EchoCluster(tmp_path_factory.mktemp("run"), step_s=0.001) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


def with_field(name: str, value: Any) -> dict[str, Any]:
    """A message with one field more, which may be of an object in it."""
    outer, _, inner = name.rpartition(".")
    more: dict[str, Any] = {name: value}
    if outer == "tools":
        more = {"tools": [{**TOOL, inner: value}]}
    elif outer == "tool_choice":
        kind = {"name": "tool", "type": value}.get(inner, "any")
        more = {"tools": [TOOL], "tool_choice": {"type": kind, **({} if inner == "type" else {inner: value})}}
    elif outer == "thinking":
        more = {"thinking": {"type": "enabled", inner: value}}
    elif outer == "text":
        more = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", inner: value}]}]}
    elif outer in ("tool_use", "tool_result"):
        use, result = (
            {**block, inner: value} if block["type"] == outer else block for block in (USE, RESULT)
        )
        said = {"role": "assistant", "content": [use]}
        more = {"messages": [QUESTION, said, {"role": "user", "content": [result]}], "tools": [TOOL]}
    elif outer:
        more = {outer: {inner: value}}
    elif name == "tool_choice":
        more["tools"] = [TOOL]
    return {**BODY, **more}


def test_what_asks_for_more_than_there_is_is_refused_by_name(cluster: EchoCluster) -> None:
    for name, value in REFUSED.items():
        for path in (MESSAGES, COUNT) if name not in ONLY_MESSAGES else (MESSAGES,):
            status, _, answer = ask(cluster, path, with_field(name, value))
            assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), (name, answer)
            assert name.rpartition(".")[2] in answer["error"]["message"], (name, answer)


def test_what_is_served_is_accepted(cluster: EchoCluster) -> None:
    for name, value in ACCEPTED.items():
        for path in (MESSAGES, COUNT) if name not in ONLY_MESSAGES else (MESSAGES,):
            status, _, answer = ask(cluster, path, with_field(name, value))
            assert status == 200, (name, path, answer)


def test_fields_that_nobody_knows_are_accepted(cluster: EchoCluster) -> None:
    for path in (MESSAGES, COUNT):
        assert ask(cluster, path, {**BODY, "something_new": {"deep": [1]}, "x-y": None})[0] == 200


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_field_of_the_package_is_decided_about() -> None:
    python = client_environment(PACKAGE)
    walked = subprocess.run([python, "-c", WALK], capture_output=True, text=True, check=True, timeout=120)
    fields = json.loads(walked.stdout)
    decided = {*ACCEPTED, *REFUSED}
    of_a_message = set(fields[""])
    assert of_a_message - set(fields.pop("count")) == ONLY_MESSAGES
    assert {prefix + name for prefix, names in fields.items() for name in names} == decided
