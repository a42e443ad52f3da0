"""What the clients of a chaos run ask for: greedy and drawn, short and long, over HTTP and ZeroMQ.

Read by the oracle, which computes the answers, and by the load, which sends them. Each answer is the same whenever it
is asked for: a drawn one has a seed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from gateway.grammars import from_json_schema
from gateway.protocol import SamplingParams
from tests.references import CHAT_OPENING, PROMPTS

HTTP, ZMQ = "http", "zmq"

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 10, "maxLength": 30},
        "genre": {"enum": ["novel", "poem", "play"]},
        "chapters": {
            "type": "array",
            "items": {"type": "string", "minLength": 8, "maxLength": 24},
            "minItems": 3,
            "maxItems": 3,
        },
    },
    "required": ["title", "genre", "chapters"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Case:
    """One question."""

    name: str
    prompt: str
    params: SamplingParams
    num_choices: int = 1
    stop: tuple[str, ...] = ()
    schema: dict[str, Any] | None = None
    via: tuple[str, ...] = (HTTP, ZMQ)
    weight: int = 2
    """How often it is asked, against the others."""

    @property
    def grammar(self) -> str | None:
        """The schema as ZeroMQ clients and the sampler know it."""
        return None if self.schema is None else from_json_schema(json.dumps(self.schema))

    def body(self, model: str) -> dict[str, Any]:
        """The body of POST /v1/completions."""
        params = self.params
        body: dict[str, Any] = {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "seed": params.seed,
            "ignore_eos": params.ignore_eos,
            "repetition_penalty": params.repetition_penalty,
            "frequency_penalty": params.frequency_penalty,
            "presence_penalty": params.presence_penalty,
            "logprobs": params.logprobs,
            "n": self.num_choices,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.stop:
            body["stop"] = list(self.stop)
        if self.schema is not None:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "book", "schema": self.schema},
            }
        return body


def _greedy(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **{"ignore_eos": True, **options})


def _drawn(max_tokens: int, seed: int, **options: Any) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens, seed=seed, **{"temperature": 0.8, "ignore_eos": True, **options}
    )


CASES = [
    Case("greedy, short", PROMPTS[6], _greedy(12), weight=3),
    Case("greedy, chat", PROMPTS[0], _greedy(48), weight=3),
    Case("greedy, code", PROMPTS[5], _greedy(64)),
    Case("greedy, long", PROMPTS[1], _greedy(200)),
    Case("greedy, story", PROMPTS[4], _greedy(160)),
    Case("greedy, long prompt", PROMPTS[7], _greedy(24), weight=3),
    Case("greedy to its end", CHAT_OPENING.format("Name three colours."), _greedy(120, ignore_eos=False)),
    Case("drawn", PROMPTS[4], _drawn(96, 11)),
    Case("drawn, long", PROMPTS[2], _drawn(160, 12)),
    Case(
        "drawn, with penalties",
        PROMPTS[3],
        _drawn(80, 13, repetition_penalty=1.1, frequency_penalty=0.4, presence_penalty=0.3),
    ),
    Case("two choices", PROMPTS[1], _drawn(60, 14), num_choices=2, via=(HTTP,)),
    Case("log-probabilities", PROMPTS[3], _greedy(60, logprobs=2)),
    Case("stop string", PROMPTS[6], _greedy(80), stop=("23, 24",)),
    Case(
        "JSON schema", CHAT_OPENING.format("Invent a book."), _drawn(160, 15, ignore_eos=False), schema=SCHEMA
    ),
]
BY_NAME = {case.name: case for case in CASES}
