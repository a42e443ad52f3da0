"""The bodies that the OpenAI endpoints send, and how outputs become chunks of a stream.

Everything here runs once a token for each stream: structs, encoded by msgspec, no validation.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass

import msgspec
from msgspec import UNSET, Struct, UnsetType

from gateway.protocol import Output

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

_encode = msgspec.json.Encoder().encode


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Delta(Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class ChatChunkChoice(Struct):
    index: int
    delta: Delta
    logprobs: None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET


class ChatChunk(Struct, kw_only=True):
    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class AnswerMessage(Struct, kw_only=True):
    role: str = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Struct, kw_only=True):
    index: int
    message: AnswerMessage
    logprobs: None = None
    finish_reason: str
    stop_reason: int | str | None = None


class ChatAnswer(Struct, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(Struct):
    """One choice of a completion, in a chunk and in a whole answer."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET


class TextAnswer(Struct, kw_only=True):
    """A completion; a chunk of a stream looks the same."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET


@dataclass
class Choice:
    """One answer as it has come so far."""

    index: int
    text: str = ""
    num_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Answer:
    """What all choices of one HTTP request share. Subclasses know the endpoint's shape."""

    prefix: str

    def __init__(self, model: str, prompt_tokens: int, *, usage: bool = False, running_usage: bool = False):
        """`usage`: a stream ends with a chunk of its usage; `running_usage`: every chunk carries it."""
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self._usage = usage
        self._running_usage = running_usage

    def chunk(self, index: int, output: Output) -> bytes:
        """The server-sent events for one output; empty if there is nothing to say."""
        raise NotImplementedError

    def last_chunk(self) -> bytes:
        """The usage, where it was asked for."""
        raise NotImplementedError

    def whole(self, choices: list[Choice]) -> bytes:
        """The body without streaming."""
        raise NotImplementedError

    def _usage_now(self) -> Usage:
        total = self.prompt_tokens + self.completion_tokens
        return Usage(self.prompt_tokens, self.completion_tokens, total)

    def _chunk_usage(self) -> Usage | UnsetType | None:
        if self._running_usage:
            return self._usage_now()
        return None if self._usage else UNSET


class ChatAnswerBuilder(Answer):
    """For /v1/chat/completions."""

    prefix = "chatcmpl"

    def __init__(self, model: str, prompt_tokens: int, *, usage: bool = False, running_usage: bool = False):
        super().__init__(model, prompt_tokens, usage=usage, running_usage=running_usage)
        self._begun: set[int] = set()

    def chunk(self, index: int, output: Output) -> bytes:
        self.completion_tokens += len(output.token_ids)
        begin = b""
        if index not in self._begun:
            self._begun.add(index)
            begin = self._event([ChatChunkChoice(index, Delta("assistant", ""))])
        if not output.text and output.finish_reason is None:
            return begin
        choice = ChatChunkChoice(
            index, Delta(content=output.text or ""), finish_reason=finish_reason(output.finish_reason)
        )
        if output.finish_reason is not None:
            choice.stop_reason = output.stop_reason
        return begin + self._event([choice])

    def last_chunk(self) -> bytes:
        return self._event([], self._usage_now()) if self._usage else b""

    def whole(self, choices: list[Choice]) -> bytes:
        self.completion_tokens = sum(choice.num_tokens for choice in choices)
        answers = [
            ChatChoice(
                index=choice.index,
                message=AnswerMessage(content=choice.text),
                finish_reason=finish_reason(choice.finish_reason) or "stop",
                stop_reason=choice.stop_reason,
            )
            for choice in choices
        ]
        return _encode(
            ChatAnswer(
                id=self.id, created=self.created, model=self.model, choices=answers, usage=self._usage_now()
            )
        )

    def _event(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> bytes:
        chunk = ChatChunk(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage or self._chunk_usage(),
        )
        return b"data: %b\n\n" % _encode(chunk)


class TextAnswerBuilder(Answer):
    """For /v1/completions."""

    prefix = "cmpl"

    def chunk(self, index: int, output: Output) -> bytes:
        self.completion_tokens += len(output.token_ids)
        if not output.text and output.finish_reason is None:
            return b""
        choice = TextChoice(index, output.text or "", finish_reason=finish_reason(output.finish_reason))
        if output.finish_reason is not None:
            choice.stop_reason = output.stop_reason
        return self._event([choice])

    def last_chunk(self) -> bytes:
        return self._event([], self._usage_now()) if self._usage else b""

    def whole(self, choices: list[Choice]) -> bytes:
        self.completion_tokens = sum(choice.num_tokens for choice in choices)
        answers = [
            TextChoice(
                choice.index,
                choice.text,
                finish_reason=finish_reason(choice.finish_reason),
                stop_reason=choice.stop_reason,
            )
            for choice in choices
        ]
        return self._encode(answers, self._usage_now())

    def _event(self, choices: list[TextChoice], usage: Usage | None = None) -> bytes:
        return b"data: %b\n\n" % self._encode(choices, usage or self._chunk_usage())

    def _encode(self, choices: list[TextChoice], usage: Usage | UnsetType | None) -> bytes:
        answer = TextAnswer(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)
        return _encode(answer)


def finish_reason(reason: str | None) -> str | None:
    """OpenAI knows no "cancelled": an answer that was ended from outside just stops."""
    return "stop" if reason == "cancelled" else reason
