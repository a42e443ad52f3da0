"""Every field that the types of the installed `openai` package define is honoured or refused by name, never ignored.

The types are walked, so that a newer package with a new field fails here until somebody decides about it.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types import (
    batch_create_params,
    completion_create_params,
    embedding_create_params,
    file_create_params,
)
from openai.types.chat import chat_completion_stream_options_param as chat_stream_options
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import (
    function_tool_param,
    response_create_params,
    response_text_config_param,
)
from openai.types.shared_params import function_definition, reasoning

from tests.echo_world import EchoCluster
from tests.unit.http_asking import CHAT, TEXT, Answer, ask, chat

EMBED, RESPONSES, BATCHES, FILES = "/v1/embeddings", "/v1/responses", "/v1/batches", "/v1/files"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: chat("abc", max_tokens=2),
    TEXT: {"prompt": "abc", "max_tokens": 2},
    EMBED: {"input": "abc"},
    RESPONSES: {"input": "abc", "max_output_tokens": 2},
}

TYPES: dict[tuple[str, str], Any] = {
    (CHAT, ""): chat_create_params.CompletionCreateParamsBase,
    (CHAT, "stream_options."): chat_stream_options.ChatCompletionStreamOptionsParam,
    (CHAT, "tools.function."): function_definition.FunctionDefinition,
    (TEXT, ""): completion_create_params.CompletionCreateParamsBase,
    (EMBED, ""): embedding_create_params.EmbeddingCreateParams,
    (RESPONSES, ""): response_create_params.ResponseCreateParamsBase,
    (RESPONSES, "stream_options."): response_create_params.StreamOptions,
    (RESPONSES, "background_options."): response_create_params.BackgroundOptions,
    (RESPONSES, "reasoning."): reasoning.Reasoning,
    (RESPONSES, "text."): response_text_config_param.ResponseTextConfigParam,
    (RESPONSES, "tools."): function_tool_param.FunctionToolParam,
    (BATCHES, ""): batch_create_params.BatchCreateParams,
    (FILES, ""): file_create_params.FileCreateParams,
}
"""Where the fields of each type stand in a body."""

FUNCTION = {"name": "look", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
FLAT_TOOL = {"type": "function", **FUNCTION}
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]

REFUSED: dict[str, dict[str, Any]] = {
    CHAT: {
        "audio": {"voice": "alloy", "format": "wav"},
        "function_call": "look",
        "functions": [FUNCTION],
        "messages": IMAGE,
        "modalities": ["text", "audio"],
        "moderation": {"model": "x"},
        "service_tier": "flex",
        "store": True,
        "verbosity": "low",
        "web_search_options": {},
    },
    TEXT: {"suffix": "end"},
    EMBED: {},
    RESPONSES: {
        "access_programs": {"cyber": "standard"},
        "context_management": [{"type": "compaction"}],
        "conversation": "conv_1",
        "image": {"context_compression": "enabled"},
        "include": ["reasoning.encrypted_content"],
        "moderation": {"model": "x"},
        "prompt": {"id": "pmpt_1"},
        "service_tier": "priority",
        "background_options.completion_window": "2h",
        "reasoning.context": "all_turns",
        "reasoning.generate_summary": "detailed",
        "reasoning.mode": "pro",
        "reasoning.summary": "detailed",
        "text.verbosity": "high",
        "tools.allowed_callers": ["programmatic"],
        "tools.async": True,
        "tools.defer_loading": True,
        "tools.output_schema": {"type": "object"},
        "tools.type": "web_search",
    },
    BATCHES: {"completion_window": "1y", "endpoint": "/v1/images/generations"},
    FILES: {"purpose": "vision"},
}
"""Values that ask for what is not served: a 400 that names the field."""

ACCEPTED: dict[str, dict[str, Any]] = {
    CHAT: {
        "frequency_penalty": 0.5,
        "logit_bias": {"70": -5},
        "logprobs": True,
        "max_completion_tokens": 3,
        "max_tokens": 3,
        "model": "echo",
        "n": 2,
        "parallel_tool_calls": False,
        "presence_penalty": 0.5,
        "reasoning_effort": "low",
        "response_format": {"type": "text"},
        "seed": 5,
        "stop": ["x"],
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "tool_choice": "auto",
        "tools": [TOOL],
        "top_logprobs": 2,
        "top_p": 0.5,
        # Hints, and labels of the client's own: they change no answer.
        "metadata": {"a": "b"},
        "prediction": {"type": "content", "content": "x"},
        "prompt_cache_key": "a",
        "prompt_cache_options": {"mode": "implicit"},
        "prompt_cache_retention": "24h",
        "safety_identifier": "a",
        "user": "a",
        "stream_options.include_obfuscation": True,
        "stream_options.include_usage": True,
        "tools.function.description": "Looks.",
        "tools.function.name": "look",
        "tools.function.parameters": {"type": "object"},
        "tools.function.strict": True,
    },
    TEXT: {
        "best_of": 2,
        "echo": True,
        "frequency_penalty": 0.5,
        "logit_bias": {"70": -5},
        "logprobs": 2,
        "max_tokens": 3,
        "model": "echo",
        "n": 2,
        "presence_penalty": 0.5,
        "prompt": "abc",
        "seed": 5,
        "stop": "x",
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "top_p": 0.5,
        "user": "a",
    },
    EMBED: {
        "dimensions": 4,
        "encoding_format": "base64",
        "input": "abc",
        "model": "echo",
        "user": "a",
    },
    RESPONSES: {
        "background": True,
        "background_options": {"completion_window": "soonest"},
        "background_options.continuation_id": "a",
        "input": "abc",
        "instructions": "Be kind.",
        "max_output_tokens": 3,
        "max_tool_calls": 2,
        "metadata": {"a": "b"},
        "model": "echo",
        "parallel_tool_calls": False,
        "previous_response_id": "",
        "reasoning": {"effort": "low"},
        "reasoning.effort": "low",
        "store": False,
        "stream_options": {},
        "stream_options.include_obfuscation": False,
        "temperature": 0.5,
        "text": {"format": {"type": "text"}},
        "text.format": {"type": "json_object"},
        "tool_choice": "auto",
        "tools": [FLAT_TOOL],
        "tools.description": "Looks.",
        "tools.name": "look",
        "tools.parameters": {"type": "object"},
        "tools.strict": True,
        "top_logprobs": 2,
        "top_p": 0.5,
        "truncation": "auto",
        "prompt_cache_key": "a",
        "prompt_cache_options": {"mode": "implicit"},
        "prompt_cache_retention": "24h",
        "safety_identifier": "a",
        "user": "a",
    },
    BATCHES: {"input_file_id": "", "metadata": {"a": "b"}, "output_expires_after": {}},
    FILES: {"expires_after": {}, "file": ""},
}
"""Values that are honoured: what they do is shown by the tests of their endpoint. Of batches and files: all there is
to them is in their tests."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    with EchoCluster(tmp_path_factory.mktemp("run"), step_s=0.001) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


@pytest.mark.parametrize("place", TYPES, ids=lambda place: "".join(place))
def test_every_field_of_the_types_is_decided_about(place: tuple[str, str]) -> None:
    path, prefix = place
    fields = {prefix + name.rstrip("_") for name in typing.get_type_hints(TYPES[place])}
    assert fields <= {*REFUSED[path], *ACCEPTED[path]}
    known = {prefix + name.removeprefix(prefix) for name in (*REFUSED[path], *ACCEPTED[path])}
    assert fields <= known


def with_field(path: str, name: str, value: Any) -> dict[str, Any]:
    """A body with one field more, which may be of an object in it."""
    body = dict(BODIES[path])
    outer, _, inner = name.rpartition(".")
    if outer == "":
        body[name] = value
    elif outer == "tools.function":
        body["tools"] = [{**TOOL, "function": {**FUNCTION, inner: value}}]
    elif outer == "tools":
        body["tools"] = [{**FLAT_TOOL, inner: value}]
    else:
        body[outer] = {inner: value}
    if name.startswith("stream_options"):
        body["stream"] = True
    if name.startswith("background_options"):
        body["background"] = True
    if name == "top_logprobs" and path == CHAT:
        body["logprobs"] = True
    if name == "previous_response_id":
        body["store"] = True
    return body


def asked(cluster: EchoCluster, path: str, name: str, value: Any) -> Answer:
    return ask(cluster, path, with_field(path, name, value))


@pytest.mark.parametrize("path", BODIES)
def test_what_asks_for_more_than_there_is_is_refused_by_name(cluster: EchoCluster, path: str) -> None:
    for name, value in REFUSED[path].items():
        status, _, answer = asked(cluster, path, name, value)
        assert status == 400, (name, answer)
        error = answer["error"]
        last = name.rpartition(".")[2]
        assert last in (error["param"] or ""), (name, error)
        assert error["code"] in ("unsupported_parameter", "unsupported_content"), (name, error)


@pytest.mark.parametrize("path", BODIES)
def test_what_is_served_is_accepted(cluster: EchoCluster, path: str) -> None:
    for name, value in ACCEPTED[path].items():
        if name == "previous_response_id":
            value = ask(cluster, RESPONSES, BODIES[RESPONSES])[2]["id"]
        status, _, answer = asked(cluster, path, name, value)
        assert status == 200, (name, answer)
        assert asked(cluster, path, name.partition(".")[0], None)[0] == 200 or name in (
            "messages",
            "prompt",
            "input",
        )


@pytest.mark.parametrize("path", BODIES)
def test_fields_that_nobody_knows_are_accepted(cluster: EchoCluster, path: str) -> None:
    assert ask(cluster, path, {**BODIES[path], "something_new": {"deep": [1]}, "x-y": None})[0] == 200
