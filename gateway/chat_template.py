"""Renders a model's chat template the way transformers does (`apply_chat_template`).

A template comes with a model and is code of a stranger: it runs in jinja2's immutable sandbox, sees plain data only,
and has so many steps and characters. Called by text.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.parser import Parser

from gateway.errors import GatewayError, ModelFilesError
from gateway.template_limits import BoundedEnvironment, bounded_join, limited

Message = dict[str, Any]
"""Role, content and whatever else the template reads; plain JSON types only."""


class ChatTemplateError(GatewayError):
    """The template refused these messages; its text is the template's own."""


class ChatTemplate:
    """A compiled template with the model's special tokens (`bos_token` and so on)."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        """Raises ModelFilesError for a template that does not compile."""
        self.source = source
        self._special_tokens = special_tokens
        self.variables: frozenset[str] = frozenset()
        """The names that it reads and does not set itself."""
        environment = BoundedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelFilesError(f"the chat template does not compile: {error}") from None

    def render(
        self,
        messages: list[Message],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """The prompt of a conversation. `variables`: what else the template may read, plain JSON types only; they
        replace nothing that is the template's anyway. `tools`: as OpenAI's clients describe them. Raises
        ChatTemplateError."""
        names = {
            **(variables or {}),
            **self._special_tokens,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with limited():
                parts = self._template.generate(names)
                return bounded_join(parts)
        except (
            jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError,
            RecursionError, MemoryError,
        ) as error:  # fmt: skip
            raise ChatTemplateError(f"the chat template refused these messages: {error}") from None


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's part for training; here it is only passed through."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Not jinja2's own filter, which escapes characters for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
