"""What a client asks with and what it gets in the end: prompts, finished requests, and the numbers of pooled ones.

Used by AsyncClient and Client; nothing here talks to anybody.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict, cast

import msgspec

from gateway.errors import RequestFailed
from gateway.protocol import ChatMessage, FinishReason, Output, Pooling, SamplingParams

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text or a conversation, messages of `role` and `content` (both for the front only), or token ids."""


class SubmittedPrompt(TypedDict, total=False):
    """The fields of a Submit that a prompt becomes."""

    prompt: str
    prompt_token_ids: list[int]
    messages: list[ChatMessage]


def submitted(prompt: Prompt) -> SubmittedPrompt:
    """Raises ValueError for a conversation whose messages have something else than a role and a text."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if not (prompt and isinstance(prompt[0], Mapping)):
        return {"prompt_token_ids": cast("list[int]", list(prompt))}
    try:
        return {"messages": msgspec.convert(list(prompt), list[_GivenMessage])}
    except msgspec.ValidationError as error:
        raise ValueError(f"a message is a role and a text: {error}") from None


class _GivenMessage(ChatMessage, frozen=True, forbid_unknown_fields=True):
    """As a caller writes it: nothing that would be lost on the way."""


@dataclass
class Generation:
    """A finished request, or what there is of it."""

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    """Empty when rank 0 answered, which knows token ids only."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    numbers: list[float] | None = None
    """What a request with `pooling` brought."""

    def add(self, output: Output) -> None:
        self.token_ids += output.token_ids
        self.text += output.text or ""
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            self.stop_reason = output.stop_reason
        if output.pooled is not None:
            self.numbers = list(struct.unpack(f"<{len(output.pooled) // 4}f", output.pooled))


class Scored(TypedDict):
    """What `submit` is given to score a continuation."""

    prompt: Prompt
    params: SamplingParams
    continuation: str | None


def scored(prompt: Prompt, continuation: Prompt) -> Scored:
    """A request for the log-probabilities of a continuation. Raises ValueError if only one
    of them is text."""
    if isinstance(prompt, str) != isinstance(continuation, str) or not all(
        isinstance(part, str) or not part or isinstance(part[0], int) for part in (prompt, continuation)
    ):
        raise ValueError("prompt and continuation must both be text, or both token ids")
    if isinstance(prompt, str) or isinstance(continuation, str):
        params = SamplingParams(pooling=Pooling("score"))
        return Scored(prompt=prompt, params=params, continuation=str(continuation))
    params = SamplingParams(pooling=Pooling("score", first_scored=len(prompt)))
    return Scored(prompt=[*prompt, *continuation], params=params, continuation=None)


def numbers_of(generation: Generation) -> list[float]:
    """What a request with pooling brought. Raises RequestFailed if it was cancelled."""
    if generation.numbers is None:
        raise RequestFailed(
            "internal", f"the request ended with {generation.finish_reason}, without its numbers"
        )
    return generation.numbers
