"""The formats in which models write tool calls: one table, with the parser of each and how a grammar writes it.

Which one a model has is read from its chat template, or named by --tool-call-parser.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gateway.tool_calls.json_calls import JsonCallsParser
from gateway.tool_calls.pieces import ToolParser
from gateway.tool_calls.pythonic import PythonicParser
from gateway.tool_calls.xml_calls import XmlCallsParser

ParameterTypes = Mapping[str, Mapping[str, str]]
"""Of each function, of each parameter, its type; a function without any has an empty one."""


@dataclass(frozen=True)
class Wrapping:
    """What stands around the arguments of calls. `{name}` is the function's name."""

    before_call: str
    after_call: str
    before_all: str = ""
    between: str = ""
    after_all: str = ""
    arguments: str = "json"
    """Or `python`, or `xml`: see grammar.py."""


@dataclass(frozen=True)
class ToolFormat:
    """One way to write calls."""

    make_parser: Callable[[ParameterTypes], ToolParser]
    wrapping: Wrapping
    markers: tuple[str, ...]
    """Texts that may be special tokens of the model, which otherwise have no text."""
    trigger: str | None
    """What each series of calls begins with; None where calls begin the answer without a marker."""
    id_length: int = 24
    """Letters and digits of a call's id; Mistral's templates want nine in all."""
    id_prefix: str = "call_"


def _json(
    opens: tuple[str, ...],
    closes: tuple[str, ...] = (),
    *,
    is_bare: bool = False,
    takes_names: bool = False,
) -> Callable[[ParameterTypes], ToolParser]:
    return lambda types: JsonCallsParser(
        opens, closes, known=types.keys(), is_bare=is_bare, takes_names=takes_names
    )


def _pythonic(opens: tuple[str, ...], close: str) -> Callable[[ParameterTypes], ToolParser]:
    return lambda types: PythonicParser(opens, close, known=types.keys(), is_bare=True)


_HERMES = ("<tool_call>", "</tool_call>")
_MISTRAL = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
_PHI = ("<|tool_call|>", "<|/tool_call|>")

FORMATS: dict[str, ToolFormat] = {
    "hermes": ToolFormat(
        _json(_HERMES[:1], _HERMES[1:]),
        Wrapping(
            '<tool_call>\n{{"name": "{name}", "arguments": ', "}}\n</tool_call>", between="\n"
        ),
        _HERMES,
        "<tool_call>",
    ),
    "llama3_json": ToolFormat(
        _json(("<|python_tag|>",), is_bare=True),
        Wrapping('{{"name": "{name}", "parameters": ', "}}", between="; "),
        ("<|python_tag|>",),
        None,
    ),
    "mistral": ToolFormat(
        _json(_MISTRAL[:1], takes_names=True),
        Wrapping(
            '{{"name": "{name}", "arguments": ',
            "}}",
            before_all="[TOOL_CALLS][",
            between=", ",
            after_all="]",
        ),
        _MISTRAL,
        "[TOOL_CALLS]",
        id_length=9,
        id_prefix="",
    ),
    "mistral_args": ToolFormat(
        _json(_MISTRAL[:1], takes_names=True),
        Wrapping("[TOOL_CALLS]{name}[ARGS]", ""),
        _MISTRAL,
        "[TOOL_CALLS]",
        id_length=9,
        id_prefix="",
    ),
    "phi4_mini_json": ToolFormat(
        _json((*_PHI[:1], "functools"), _PHI[1:]),
        Wrapping(
            '{{"name": "{name}", "arguments": ',
            "}}",
            before_all="<|tool_call|>[",
            between=", ",
            after_all="]<|/tool_call|>",
        ),
        _PHI,
        "<|tool_call|>",
    ),
    "granite": ToolFormat(
        _json(("<|tool_call|>", "<tool_call>"), ("</tool_call>",)),
        Wrapping(
            '{{"name": "{name}", "arguments": ',
            "}}",
            before_all="<|tool_call|>[",
            between=", ",
            after_all="]",
        ),
        ("<|tool_call|>", "<tool_call>"),
        "<|tool_call|>",
    ),
    "pythonic": ToolFormat(
        _pythonic((), ""),
        Wrapping(
            "{name}(", ")", before_all="[", between=", ", after_all="]", arguments="python"
        ),
        (),
        None,
    ),
    "gemma": ToolFormat(
        _pythonic(("```tool_code",), "```"),
        Wrapping(
            "{name}(",
            ")",
            before_all="```tool_code\n",
            between="\n",
            after_all="\n```",
            arguments="python",
        ),
        (),
        "```tool_code",
    ),
    "qwen3_coder": ToolFormat(
        XmlCallsParser,
        Wrapping(
            "<tool_call>\n<function={name}>\n",
            "</function>\n</tool_call>",
            between="\n",
            arguments="xml",
        ),
        _HERMES,
        "<tool_call>",
    ),
}  # fmt: skip

ALIASES = {
    "qwen": "hermes", "qwen25": "hermes", "smollm3": "hermes", "longcat": "hermes", "granite4": "hermes",
    "llama3": "llama3_json", "llama4_json": "llama3_json", "phi4": "phi4_mini_json",
    "llama4_pythonic": "pythonic", "olmo3": "pythonic", "qwen3_xml": "qwen3_coder", "gemma3": "gemma",
}  # fmt: skip

FALLBACK = "hermes"
"""What a model is told to write whose template knows no tools."""

_SIGNS: tuple[tuple[str, str], ...] = (
    (r"\[ARGS\]", "mistral_args"),
    (r"\[TOOL_CALLS\]", "mistral"),
    (r"<function=", "qwen3_coder"),
    (r"<tool_call>", "hermes"),
    (r"<\|start_of_role\|>", "granite"),
    (r"<\|tool_call\|>|functools\[", "phi4_mini_json"),
    (r"tool_code", "gemma"),
    (r"\[func_name1?\(|\[function_name\(", "pythonic"),
    (r"<\|python_tag\|>|ipython", "llama3_json"),
)


def tool_format_names() -> list[str]:
    """What --tool-call-parser may be."""
    return sorted({*FORMATS, *ALIASES})


def find_tool_format(name: str) -> str:
    """The name in FORMATS. Raises KeyError."""
    name = ALIASES.get(name, name)
    if name not in FORMATS:
        raise KeyError(name)
    return name


def format_of_template(source: str) -> str:
    """The format of a model whose chat template knows tools."""
    return next((name for sign, name in _SIGNS if re.search(sign, source)), FALLBACK)
