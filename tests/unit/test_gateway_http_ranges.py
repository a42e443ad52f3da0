"""Every field of every request, with values that are not allowed: each is refused by name, with what is allowed.

The table must have a row for each field that a request knows, so that a new one cannot come without its refusals.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gateway.http.embeddings import EmbeddingRequest
from gateway.http.schema import ChatRequest, CompletionRequest
from tests.echo_world import EchoCluster
from tests.unit.http_asking import CHAT, TEXT, ask, chat

EMBED = "/v1/embeddings"


EVERYWHERE: dict[str, list[tuple[Any, str]]] = {
    "model": [("other", "this server has 'echo'"), (5, "Expected `str | null`")],
    "user": [(5, "Expected `str | null`")],
    "priority": [
        (2**31, "32-bit integers"),
        (-(2**31) - 1, "32-bit integers"),
        ("high", "Expected `int | null`"),
    ],
    "timeout": [
        (0, "above 0, at most 86400 seconds"),
        (86_401, "at most 86400"),
        ("1s", "Expected `float | null`"),
    ],
}
GENERATION: dict[str, list[tuple[Any, str]]] = {
    **EVERYWHERE,
    "max_tokens": [
        (0, "at least 1"),
        (-1, "at least 1"),
        (1000, "maximum length of this model is 500"),
        (1.5, "int"),
    ],
    "n": [(0, "from 1 to 128"), (129, "from 1 to 128"), ("2", "Expected `int | null`")],
    "stream": [("yes", "Expected `bool | null`")],
    "stream_options": [
        ({"include_usage": True}, "only allowed with stream"),
        (True, "Expected `object | null`"),
    ],
    "stop": [([""], "1 to 4096"), (["x" * 4097], "1 to 4096"), (["x"] * 17, "up to 16"), (5, "Expected")],
    "seed": [(2**63, "64-bit integers"), (1.5, "Expected `int | null`")],
    "temperature": [(-0.1, "from 0 to 2"), (2.1, "from 0 to 2"), ("hot", "Expected `float | null`")],
    "top_p": [(0, "above 0, at most 1"), (1.1, "above 0, at most 1")],
    "top_k": [(-2, "at least 1, or 0 or -1 for all"), (2**31, "at least 1"), (0.5, "Expected `int | null`")],
    "min_p": [(-0.1, "from 0 to 1"), (1.1, "from 0 to 1")],
    "min_tokens": [(-1, "from 0 to max_tokens"), (5, "here 4")],
    "ignore_eos": [("no", "Expected `bool | null`")],
    "stop_token_ids": [([300], "allowed: 0 to 299"), ([-1], "token ids"), ([1] * 257, "256 ids")],
    "frequency_penalty": [(2.1, "from -2 to 2"), (-2.1, "from -2 to 2")],
    "presence_penalty": [(2.1, "from -2 to 2"), (-2.1, "from -2 to 2")],
    "repetition_penalty": [(0, "above 0, at most 100"), (101, "above 0, at most 100")],
    "logit_bias": [
        ({"5": 101}, "from -100 to 100"),
        ({"300": 1}, "0 to 299"),
        ({"x": 1}, "token ids, in decimal"),
    ],
    "bad_words": [([""], "1 to 256 characters"), (["x"] * 129, "up to 128"), (["x" * 257], "1 to 256")],
    "prompt_logprobs": [(-1, "from 0 to 20"), (21, "from 0 to 20"), (True, "Expected `int | null`")],
    "response_format": [
        ({"type": "yaml"}, "text, json_object, json_schema"),
        ("json", "Expected `object | null`"),
    ],
    "structured_outputs": [({"choice": []}, "empty"), ([], "Expected `object | null`")],
    "guided_json": [("{", "cannot be read"), (5, "Expected")],
    "guided_regex": [("(", "unclosed group"), ("a" * 70_000, "up to 65536")],
    "guided_choice": [([], "empty"), ("a", "Expected `array | null`")],
    "guided_grammar": [("start: b", "unknown name"), ("x" * 70_000, "up to 65536")],
    "guided_whitespace_pattern": [(5, "Expected `str | null`")],
    "json_schema": [("{", "cannot be read"), (5, "Expected")],
    "regex": [("(", "unclosed group"), (5, "Expected `str | null`")],
    "ebnf": [("root ::= x", "Rule 'x' not found"), (5, "Expected `str | null`")],
    "allowed_token_ids": [
        ([300], "allowed: 0 to 299"),
        ([], "at least one"),
        ([-1], "token ids"),
        ([1] * 4097, "up to 4096"),
    ],
    "custom_logit_processor": [("x", "allowed: null")],
    "include_stop_str_in_output": [("yes", "Expected `bool | null`")],
    "logits_processors": [(["x"], "allowed: null, []")],
    "lora_path": [("x", "allowed: null")],
    "no_stop_trim": [(True, "allowed: null, false")],
    "return_token_ids": [(True, "allowed: null, false")],
    "return_tokens_as_token_ids": [(True, "allowed: null, false")],
    "skip_special_tokens": [("no", "Expected `bool | null`")],
    "truncate_prompt_tokens": [(0, "at least 1, or -1"), (-2, "at least 1"), ("x", "Expected `int | null`")],
    "typical_p": [(0.5, "allowed: null, 1.0")],
    "use_beam_search": [(True, "allowed: null, false")],
}
CHAT_FIELDS: dict[str, list[tuple[Any, str]]] = {
    **GENERATION,
    "messages": [
        ([], "at least one message"),
        ([{"role": "judge", "content": "x"}], "system, developer, user"),
    ],
    "max_completion_tokens": [(0, "at least 1"), ("x", "Expected `int | null`")],
    "logprobs": [(5, "Expected `bool | null`")],
    "top_logprobs": [(21, "from 0 to 20"), (-1, "from 0 to 20"), (2, "only allowed with logprobs")],
    "add_generation_prompt": [("no", "Expected `bool | null`")],
    "chat_template_kwargs": [("x", "Expected `object | null`")],
    "chat_template": [("{{ messages }}", "allowed: null")],
    "continue_final_message": [
        (True, "must be the assistant's"),
        ("no", "Expected `bool | null`"),
    ],
    "documents": [([{}], "allowed: null, []")],
    "tools": [
        ([{"type": "function"}], "function is missing"),
        ([{"type": "custom"}], "allowed: function"),
        ([{"type": "function", "function": {"name": "a b"}}], "1 to 128 letters"),
        ([{"type": "function", "function": {"name": "f"}}] * 2, "another tool has, too"),
        ([{"type": "function", "function": {"name": "f"}}] * 129, "up to 128"),
        ("f", "Expected `array | null`"),
    ],
    "tool_choice": [
        ("required", "there are no tools"),
        ("any", "allowed: none, auto, required"),
        ({"type": "function", "function": {"name": "f"}}, "not in tools"),
        ({"type": "custom"}, "allowed: none, auto"),
        ({"type": "allowed_tools"}, "has no mode"),
        (5, "Expected"),
    ],
    "parallel_tool_calls": [("no", "Expected `bool | null`")],
    "reasoning_effort": [("much", "none, minimal, low, medium, high"), (5, "Expected `str | null`")],
    "include_reasoning": [("no", "Expected `bool | null`")],
    "functions": [([{"name": "f"}], "allowed: null, []")],
    "function_call": [("f", 'allowed: null, "none", "auto"')],
    "modalities": [(["audio"], 'allowed: null, ["text"], []')],
    "audio": [({"voice": "x"}, "allowed: null")],
    "moderation": [({"model": "x"}, "allowed: null")],
    "service_tier": [("flex", 'allowed: null, "auto", "default"')],
    "store": [(True, "allowed: null, false")],
    "verbosity": [("low", 'allowed: null, "medium"')],
    "metadata": [("x", "Expected `object | null`")],
    "prediction": [],
    "prompt_cache_key": [(5, "Expected `str | null`")],
    "prompt_cache_options": [],
    "prompt_cache_retention": [(5, "Expected `str | null`")],
    "safety_identifier": [(5, "Expected `str | null`")],
    "web_search_options": [({}, "allowed: null")],
}
TEXT_FIELDS: dict[str, list[tuple[Any, str]]] = {
    **GENERATION,
    "prompt": [
        ([], "prompt is empty"),
        ("", "at least one token"),
        ([300], "vocabulary of 300"),
        ({}, "Expected"),
    ],
    "logprobs": [(21, "from 0 to 20"), (-1, "from 0 to 20"), (True, "from 0 to 20")],
    "echo": [("yes", "Expected `bool | null`")],
    "best_of": [(129, "to 128"), (0, "from n, here 1")],
    "suffix": [("end", 'allowed: null, ""')],
    "add_special_tokens": [(False, "allowed: null, true")],
}
EMBED_FIELDS: dict[str, list[tuple[Any, str]]] = {
    **EVERYWHERE,
    "input": [
        ([], "input is empty"),
        ("", "at least one token"),
        ([300], "vocabulary of 300"),
        ({}, "Expected"),
    ],
    "encoding_format": [("int8", "float, base64"), (5, "Expected `str | null`")],
    "dimensions": [(0, "1 to 8"), (9, "1 to 8"), (1.5, "Expected `int | null`")],
    "pooling": [("max", "last, mean")],
    "normalize": [("no", "Expected `bool | null`")],
}
ENDPOINTS: dict[str, tuple[Any, dict[str, list[tuple[Any, str]]], dict[str, Any]]] = {
    CHAT: (ChatRequest, CHAT_FIELDS, chat("abc")),
    TEXT: (CompletionRequest, TEXT_FIELDS, {"prompt": "abc"}),
    EMBED: (EmbeddingRequest, EMBED_FIELDS, {"input": "abc"}),
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    options = ("--max-model-len", "500")
    with EchoCluster(tmp_path_factory.mktemp("run"), step_s=0.001, world_options=options) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_field_is_in_the_table(path: str) -> None:
    kind, table, _ = ENDPOINTS[path]
    assert set(kind.__struct_fields__) == set(table)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_values_that_are_not_allowed_are_refused_by_name_with_what_is(
    cluster: EchoCluster, path: str
) -> None:
    _, table, body = ENDPOINTS[path]
    for field, rows in table.items():
        for value, says in rows:
            extra = {"max_tokens": 4} if field == "min_tokens" else {}
            status, _, answer = ask(cluster, path, {**body, **extra, field: value})
            assert status in (400, 404), (field, value, answer)
            error = answer["error"]
            assert says in error["message"], (field, value, error)
            assert (error["param"] or "").startswith(field) or field in error["message"], (
                field,
                value,
                error,
            )
            assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ENDPOINTS)
def test_null_asks_for_nothing(cluster: EchoCluster, path: str) -> None:
    _, table, body = ENDPOINTS[path]
    assert ask(cluster, path, {**dict.fromkeys(table), **body})[0] == 200
