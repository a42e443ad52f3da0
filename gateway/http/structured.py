"""Structured output as clients ask for it: OpenAI's `response_format`, vLLM's `structured_outputs` and the older
`guided_*` fields, SGLang's `json_schema`, `regex` and `ebnf`, turned into one grammar.

Used by the OpenAI endpoints before a request is taken on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Struct

from gateway import grammars
from gateway.http.errors import ApiError


class JsonSchemaFormat(Struct):
    name: str
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Struct):
    type: str
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Struct):
    """vLLM's; one of the first five."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None
    structural_tag: Any = None


class StructuredFields(Struct, kw_only=True):
    """The fields of a request that ask for structure."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None


@dataclass(frozen=True)
class Constraint:
    """What an answer must match, not compiled yet."""

    param: str
    _compile: Callable[[], str]

    def compile(self) -> str:
        """The grammar. Raises ApiError with the reason. May take long: call it in a thread."""
        try:
            return self._compile()
        except grammars.GrammarError as error:
            raise ApiError(400, f"{self.param}: {error}", param=self.param, code="invalid_value") from None


def constraint(request: StructuredFields) -> Constraint | None:
    """The one constraint of a request; None if it has none. Raises ApiError."""
    found = [*_response_format(request), *_structured_outputs(request), *_guided(request), *_sglang(request)]
    if len(found) > 1:
        names = ", ".join(entry.param for entry in found)
        raise ApiError(400, f"{names} exclude each other; give one of them", param=found[1].param)
    return found[0] if found else None


def _response_format(request: StructuredFields) -> list[Constraint]:
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return []
    if wanted.type == "json_object":
        return [_json_object("response_format")]
    if wanted.type != "json_schema":
        raise ApiError(
            400,
            f"response_format.type is {wanted.type!r}; allowed: text, json_object, json_schema",
            param="response_format.type",
        )
    if wanted.json_schema is None or wanted.json_schema.schema is None:
        name = "response_format.json_schema" + (".schema" if wanted.json_schema else "")
        raise ApiError(400, f"{name} is missing", param=name)
    return [_json("response_format.json_schema.schema", wanted.json_schema.schema)]


def _structured_outputs(request: StructuredFields) -> list[Constraint]:
    wanted = request.structured_outputs
    if wanted is None:
        return []
    if wanted.structural_tag is not None:
        name = "structured_outputs.structural_tag"
        text = f"{name} is not supported by this server; use json, regex, choice or grammar"
        raise ApiError(400, text, param=name, code="unsupported_parameter")
    found = _of_kinds(
        "structured_outputs.",
        wanted.json,
        wanted.regex,
        wanted.choice,
        wanted.grammar,
        wanted.whitespace_pattern,
    )
    if wanted.json_object:
        found.append(_json_object("structured_outputs.json_object", wanted.whitespace_pattern))
    return found


def _guided(request: StructuredFields) -> list[Constraint]:
    return _of_kinds(
        "guided_",
        request.guided_json,
        request.guided_regex,
        request.guided_choice,
        request.guided_grammar,
        request.guided_whitespace_pattern,
    )


def _sglang(request: StructuredFields) -> list[Constraint]:
    found = _of_kinds("", None, request.regex, None, None, None)
    if request.json_schema is not None:
        found.append(_json("json_schema", request.json_schema))
    if (grammar := request.ebnf) is not None:
        found.append(Constraint("ebnf", lambda: grammars.from_grammar(grammar)))
    return found


def _of_kinds(
    prefix: str,
    json: str | dict[str, Any] | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
    white_space: str | None,
) -> list[Constraint]:
    found = []
    if json is not None:
        found.append(_json(f"{prefix}json", json, white_space))
    if regex is not None:
        found.append(Constraint(f"{prefix}regex", lambda: grammars.from_regex(regex)))
    if choice is not None:
        found.append(Constraint(f"{prefix}choice", lambda: grammars.from_choices(choice)))
    if grammar is not None:
        found.append(Constraint(f"{prefix}grammar", lambda: grammars.from_grammar(grammar)))
    return found


def _json(param: str, schema: str | dict[str, Any], white_space: str | None = None) -> Constraint:
    text = schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()
    space = grammars.WHITE_SPACE if white_space is None else white_space
    return Constraint(param, lambda: grammars.from_json_schema(text, space))


def _json_object(param: str, white_space: str | None = None) -> Constraint:
    space = grammars.WHITE_SPACE if white_space is None else white_space
    return Constraint(param, lambda: grammars.from_json_object(space))
