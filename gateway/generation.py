"""What a client asks with and what it gets in the end: prompts, finished requests, and the numbers of pooled ones.

Used by AsyncClient and Client; nothing here talks to anybody.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from gateway.errors import RequestFailed
from gateway.protocol import FinishReason, Output, Pooling, SamplingParams

Prompt = str | Sequence[int]
"""Text (the front only) or token ids."""


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
    if isinstance(prompt, str) != isinstance(continuation, str):
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
