"""How a model writes what is more than content: tool calls, and thoughts.

Found in its chat template, or named by --tool-call-parser and --reasoning-parser. Made by the front once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.errors import ModelFilesError
from gateway.reasoning import (
    REASONING_FORMATS,
    ReasoningFormat,
    find_reasoning_format,
    reasoning_format_names,
    reasoning_of_template,
)
from gateway.text import TextModel
from gateway.tool_calls.formats import (
    FALLBACK,
    FORMATS,
    ToolFormat,
    find_tool_format,
    format_of_template,
    tool_format_names,
)


@dataclass(frozen=True)
class Dialect:
    """The formats of one model."""

    tool_format: str = FALLBACK
    """A name in FORMATS."""
    reasoning: str | None = None
    """A name in REASONING_FORMATS; None for a model that does not think aloud."""
    special: Mapping[str, int] = field(default_factory=dict)
    """The ids of those markers that are special tokens of the model."""

    @classmethod
    def of_model(cls, text: TextModel, tool_parser: str = "auto", reasoning_parser: str = "auto") -> Dialect:
        """Raises ModelFilesError for a name that is not known."""
        source = "" if text.chat_template is None else text.chat_template.source
        knows_tools = text.chat_template is not None and "tools" in text.chat_template.variables
        try:
            if tool_parser == "auto":
                tool_format = format_of_template(source) if knows_tools else FALLBACK
            else:
                tool_format = find_tool_format(tool_parser)
        except KeyError:
            allowed = ", ".join(["auto", *tool_format_names()])
            raise ModelFilesError(f"--tool-call-parser {tool_parser}: allowed: {allowed}") from None
        try:
            if reasoning_parser == "auto":
                reasoning = reasoning_of_template(source)
            else:
                reasoning = None if reasoning_parser == "none" else find_reasoning_format(reasoning_parser)
        except KeyError:
            allowed = ", ".join(["auto", "none", *reasoning_format_names()])
            raise ModelFilesError(f"--reasoning-parser {reasoning_parser}: allowed: {allowed}") from None
        markers = [*FORMATS[tool_format].markers]
        if reasoning is not None:
            thoughts = REASONING_FORMATS[reasoning]
            markers += [thoughts.opening, thoughts.closing]
        return cls(tool_format, reasoning, text.special_ids(markers))

    @property
    def tools(self) -> ToolFormat:
        return FORMATS[self.tool_format]

    @property
    def thoughts(self) -> ReasoningFormat | None:
        return None if self.reasoning is None else REASONING_FORMATS[self.reasoning]
