"""Where a model's thoughts end and its answer begins.

The formats of the families that think aloud, and how one is found in a model's chat template. Used by
message_parser.py and by the HTTP endpoints.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReasoningFormat:
    """What stands around thoughts."""

    opening: str
    closing: str
    always: bool = False
    """The model thinks even if neither the prompt nor its answer opens with the marker."""

    def is_open(self, prompt: str) -> bool:
        """Whether an answer to this prompt begins within thoughts."""
        end = prompt.rstrip()
        return end.endswith(self.opening) or (self.always and not end.endswith(self.closing))

    def is_closed(self, prompt: str) -> bool:
        """Whether the prompt has the thoughts behind it: the answer has none."""
        return prompt.rstrip().endswith(self.closing)


REASONING_FORMATS: dict[str, ReasoningFormat] = {
    "think": ReasoningFormat("<think>", "</think>"),
    "deepseek_r1": ReasoningFormat("<think>", "</think>", always=True),
    "granite": ReasoningFormat("Here is my thought process:", "Here is my response:"),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
    "seed_oss": ReasoningFormat("<seed:think>", "</seed:think>"),
}
_ALIASES = {"qwen3": "think", "smollm3": "think", "glm45": "think", "deepseek_v3": "think"}


def reasoning_format_names() -> list[str]:
    """What --reasoning-parser may be, beside `none`."""
    return sorted({*REASONING_FORMATS, *_ALIASES})


def find_reasoning_format(name: str) -> str:
    """The name in REASONING_FORMATS. Raises KeyError."""
    name = _ALIASES.get(name, name)
    if name not in REASONING_FORMATS:
        raise KeyError(name)
    return name


def reasoning_of_template(source: str) -> str | None:
    """The format of a model with this chat template; None if it does not think aloud."""
    for name in ("seed_oss", "mistral", "granite"):
        if REASONING_FORMATS[name].closing in source:
            return name
    return "think" if "</think>" in source else None
