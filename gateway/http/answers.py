"""How outputs become the answers of the OpenAI endpoints, and the chunks of their streams.

Everything here runs once a token for each stream: structs, encoded by msgspec, no validation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET, UnsetType

from gateway.http.answer_bodies import (
    AnswerMessage,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    Delta,
    FunctionDelta,
    PromptTokensDetails,
    TextAnswer,
    TextChoice,
    ToolCallDelta,
    Usage,
)
from gateway.http.errors import ApiError
from gateway.http.logprobs import Namer, Placed, PromptLogprobs, PromptText
from gateway.message_parser import MessageParser, Parsing
from gateway.protocol import Output, TokenLogprobs
from gateway.tool_calls.pieces import Kind, Piece

DONE = b"[DONE]"
KEEP_ALIVE = b": keep-alive\n"
"""No blank line behind it: OpenAI's SDK takes one for an event without data, once an event has had an id."""

PLAIN_KEEP_ALIVE = b"\n"
"""For streams without ids: nothing to those who read events, and to those who read lines, who know no comments."""

_encode = msgspec.json.Encoder().encode


@dataclass
class Choice:
    """One answer as it has come so far."""

    index: int
    text: str = ""
    num_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    placed: list[Placed] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    logprob_sum: float = 0.0
    """Of its tokens, if they were asked for."""


def best_choices(candidates: list[Choice], num_prompts: int, count: int) -> list[Choice]:
    """Of each prompt's candidates the `count` with the highest log-probability per token, the best first, or all
    in their order. Each has what is known of its prompt."""
    per_prompt = len(candidates) // num_prompts
    chosen: list[Choice] = []
    for first in range(0, len(candidates), per_prompt):
        group = candidates[first : first + per_prompt]
        for choice in group:
            choice.prompt_logprobs = group[0].prompt_logprobs
        if per_prompt > count:
            group.sort(key=lambda choice: choice.logprob_sum / max(choice.num_tokens, 1), reverse=True)
        chosen += group[:count]
    for index, choice in enumerate(chosen):
        choice.index = index
    return chosen


@dataclass(frozen=True)
class AnswerOptions:
    """What a request wants to see in its answer."""

    usage: bool = False
    """A stream ends with a chunk of its usage."""
    running_usage: bool = False
    """Every chunk of a stream carries the usage so far."""
    logprobs: bool = False
    num_top_of_prompt: int | None = None
    """Alternatives in `prompt_logprobs`; None if they are not asked for."""
    echo: Sequence[PromptText] = ()
    """The prompts, where choices begin with theirs."""
    num_top_of_echo: int = 0
    only_echo: bool = False
    """max_tokens is 0: the one token that the engine made is not shown."""
    choices_per_prompt: int = 1
    parsing: Parsing | None = None
    """What is found in the text of a chat, if it is more than content."""


class Answer:
    """What all choices of one HTTP request share. Subclasses know the endpoint's shape."""

    prefix: str

    def __init__(
        self,
        answer_id: str,
        created: int,
        model: str,
        prompt_tokens: int,
        options: AnswerOptions,
        namer: Namer,
        cached_tokens: Callable[[], int] = lambda: 0,
    ) -> None:
        """`cached_tokens`: how many of the prompts' tokens were in the prefix cache, as far as is known now."""
        self.id = answer_id
        self.created = created
        self.model = model
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self.cached_tokens = cached_tokens
        self._options = options
        self._namer = namer
        self._begun: set[int] = set()
        self._parsers: dict[int, MessageParser] = {}

    def known(self, index: int, text: str) -> None:
        """Text of a choice that the client has: what comes behind it goes on from there."""
        if self._options.parsing is not None:
            self._parser(index, self._options.parsing).feed(text)

    def _parser(self, index: int, parsing: Parsing) -> MessageParser:
        found = self._parsers.get(index)
        if found is None:
            found = self._parsers[index] = MessageParser(parsing)
        return found

    def _pieces(self, index: int, parsing: Parsing, output: Output) -> list[Piece]:
        """What an output brings."""
        parser = self._parser(index, parsing)
        pieces = parser.feed(output.text) if output.text else []
        return pieces + parser.finish() if output.finish_reason is not None else pieces

    def go_on(self, begun: Iterable[int], completion_tokens: int) -> None:
        """For a stream whose client has the first event of these choices, and so many tokens."""
        self._begun.update(begun)
        self.completion_tokens = 0 if self._options.only_echo else completion_tokens

    def chunk(self, index: int, output: Output, placed: list[Placed]) -> tuple[bytes, bytes]:
        """The data of the server-sent events for one output, with the log-probabilities that belong to its text:
        what comes before all tokens of the choice, and what comes of these. Either is empty if there is nothing
        to say."""
        raise NotImplementedError

    def keep_alive(self, *, with_ids: bool) -> bytes:
        """What a stream sends while it has nothing to say."""
        return KEEP_ALIVE if with_ids else PLAIN_KEEP_ALIVE

    def framed(self, event_id: bytes | None, data: bytes) -> bytes:
        """The data as server-sent events, behind which the client is at this id; None in a stream without ids."""
        return b"data: %b\n\n" % data if event_id is None else b"id: %b\ndata: %b\n\n" % (event_id, data)

    def ended(self, event_id: bytes | None) -> bytes:
        """The last event of a stream."""
        return self.framed(event_id, DONE)

    def failed(self, event_id: bytes | None, error: ApiError) -> bytes:
        """The last events of a stream that fails after it has begun."""
        return self.framed(event_id, error.encoded()) + self.framed(event_id, DONE)

    def last_chunk(self) -> bytes:
        """The data of the usage, where it was asked for; else empty."""
        raise NotImplementedError

    def whole(self, choices: list[Choice], completion_tokens: int) -> bytes:
        """The body without streaming."""
        raise NotImplementedError

    def _usage_now(self) -> Usage:
        total = self.prompt_tokens + self.completion_tokens
        details = PromptTokensDetails(self.cached_tokens())
        return Usage(self.prompt_tokens, self.completion_tokens, total, details)

    def _chunk_usage(self) -> Usage | UnsetType | None:
        if self._options.running_usage:
            return self._usage_now()
        return None if self._options.usage else UNSET

    def _prompt_logprobs(self, choice: Choice) -> PromptLogprobs | UnsetType:
        if self._options.num_top_of_prompt is None:
            return UNSET
        return self._namer.prompt(choice.prompt_logprobs or (), self._options.num_top_of_prompt)


class ChatAnswerBuilder(Answer):
    """For /v1/chat/completions."""

    prefix = "chatcmpl"

    def chunk(self, index: int, output: Output, placed: list[Placed]) -> tuple[bytes, bytes]:
        self.completion_tokens += len(output.token_ids)
        begin = b""
        if index not in self._begun:
            self._begun.add(index)
            begin = self._event([ChatChunkChoice(index, Delta("assistant", ""))])
        if not output.text and not placed and output.finish_reason is None:
            return begin, b""
        reason = finish_reason(output.finish_reason)
        if self._options.parsing is None:
            choice = ChatChunkChoice(index, Delta(content=output.text or ""), finish_reason=reason)
        else:
            pieces = self._pieces(index, self._options.parsing, output)
            if not pieces and not placed and reason is None:
                return begin, b""
            delta = self._delta(index, self._options.parsing, pieces)
            choice = ChatChunkChoice(index, delta, finish_reason=self._reason(index, reason))
        if placed:
            choice.logprobs = self._namer.chat(placed)
        if output.finish_reason is not None:
            choice.stop_reason = output.stop_reason
        return begin, self._event([choice])

    def last_chunk(self) -> bytes:
        return self._event([], self._usage_now()) if self._options.usage else b""

    def whole(self, choices: list[Choice], completion_tokens: int) -> bytes:
        self.completion_tokens = completion_tokens
        answers = [
            ChatChoice(
                index=choice.index,
                message=self._message(choice),
                logprobs=self._namer.chat(choice.placed) if self._options.logprobs else None,
                finish_reason=self._reason(choice.index, finish_reason(choice.finish_reason)) or "stop",
                stop_reason=choice.stop_reason,
            )
            for choice in choices
        ]
        return _encode(
            ChatAnswer(
                id=self.id,
                created=self.created,
                model=self.model,
                choices=answers,
                usage=self._usage_now(),
                prompt_logprobs=self._prompt_logprobs(choices[0]),
            )
        )

    def _reason(self, index: int, reason: str | None) -> str | None:
        """An answer that calls tools ends for them; one that was cut off was cut off."""
        calls = reason == "stop" and index in self._parsers and self._parsers[index].num_calls > 0
        return "tool_calls" if calls else reason

    def _message(self, choice: Choice) -> AnswerMessage:
        parsing = self._options.parsing
        if parsing is None:
            return AnswerMessage(content=choice.text)
        parser = self._parsers[choice.index] = MessageParser(parsing)
        delta = self._delta(choice.index, parsing, parser.feed(choice.text) + parser.finish())
        calls = delta.tool_calls or []
        for call in calls:
            call.index = UNSET
            assert call.function is not None
            call.function.arguments = call.function.arguments or ""
        message = AnswerMessage(content=delta.content if calls else delta.content or "")
        if calls:
            message.tool_calls = calls
        if parsing.reasoning is not None:
            message.reasoning_content = message.reasoning = delta.reasoning_content
        return message

    def _delta(self, index: int, parsing: Parsing, pieces: list[Piece]) -> Delta:
        texts: dict[Kind, list[str]] = {Kind.CONTENT: [], Kind.REASONING: []}
        calls: dict[int, ToolCallDelta] = {}
        arguments: dict[int, list[str]] = {}
        for kind, text, number in pieces:
            if kind is Kind.CALL:
                call_id = parsing.call_id(self.id, index, number)
                calls[number] = ToolCallDelta(number, call_id, "function", FunctionDelta(text))
                arguments[number] = [""]
            elif kind is Kind.ARGUMENTS:
                calls.setdefault(number, ToolCallDelta(number, function=FunctionDelta()))
                arguments.setdefault(number, []).append(text)
            else:
                texts[kind].append(text)
        delta = Delta()
        if texts[Kind.CONTENT] or not (calls or texts[Kind.REASONING]):
            delta.content = "".join(texts[Kind.CONTENT])
        if texts[Kind.REASONING]:
            delta.reasoning_content = delta.reasoning = "".join(texts[Kind.REASONING])
        if calls:
            for number, call in calls.items():
                assert call.function is not None
                call.function.arguments = "".join(arguments[number])
            delta.tool_calls = list(calls.values())
        return delta

    def _event(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> bytes:
        chunk = ChatChunk(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage or self._chunk_usage(),
        )
        return _encode(chunk)


class TextAnswerBuilder(Answer):
    """For /v1/completions."""

    prefix = "cmpl"

    def chunk(self, index: int, output: Output, placed: list[Placed]) -> tuple[bytes, bytes]:
        begin = b""
        if self._options.echo and index not in self._begun:
            self._begun.add(index)
            begin = self._event([self._echo(index, output.prompt_logprobs)])
        if self._options.only_echo:
            output = Output(output.request_id, 0, [], "length") if output.finish_reason else output
            placed = []
            if output.finish_reason is None:
                return begin, b""
        self.completion_tokens += len(output.token_ids)
        if not output.text and not placed and output.finish_reason is None:
            return begin, b""
        choice = TextChoice(index, output.text or "", finish_reason=finish_reason(output.finish_reason))
        if placed:
            choice.logprobs = self._namer.completion(placed, self._shift(index))
        if output.finish_reason is not None:
            choice.stop_reason = output.stop_reason
        return begin, self._event([choice])

    def last_chunk(self) -> bytes:
        return self._event([], self._usage_now()) if self._options.usage else b""

    def whole(self, choices: list[Choice], completion_tokens: int) -> bytes:
        self.completion_tokens = 0 if self._options.only_echo else completion_tokens
        return self._encode([self._whole_choice(choice) for choice in choices], self._usage_now())

    def _whole_choice(self, choice: Choice) -> TextChoice:
        options = self._options
        answer = TextChoice(choice.index, "", prompt_logprobs=self._prompt_logprobs(choice))
        if options.echo:
            answer = self._echo(choice.index, choice.prompt_logprobs)
            answer.prompt_logprobs = self._prompt_logprobs(choice)
        if options.only_echo:
            answer.finish_reason, answer.stop_reason = "length", None
            return answer
        if options.logprobs:
            new = self._namer.completion(choice.placed, self._shift(choice.index))
            answer.logprobs = new if answer.logprobs is None else answer.logprobs + new
        answer.text += choice.text
        answer.finish_reason, answer.stop_reason = finish_reason(choice.finish_reason), choice.stop_reason
        return answer

    def _echo(self, index: int, entries: list[TokenLogprobs] | None) -> TextChoice:
        """A choice that has its prompt only."""
        prompt = self._options.echo[index // self._options.choices_per_prompt]
        choice = TextChoice(index, prompt.text)
        if self._options.logprobs:
            choice.logprobs = self._namer.echo(prompt, entries or (), self._options.num_top_of_echo)
        return choice

    def _shift(self, index: int) -> int:
        """Where the new text of a choice begins."""
        echo = self._options.echo
        return len(echo[index // self._options.choices_per_prompt].text) if echo else 0

    def _event(self, choices: list[TextChoice], usage: Usage | None = None) -> bytes:
        return self._encode(choices, usage or self._chunk_usage())

    def _encode(self, choices: list[TextChoice], usage: Usage | UnsetType | None) -> bytes:
        answer = TextAnswer(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)
        return _encode(answer)


def finish_reason(reason: str | None) -> str | None:
    """As vLLM says it: OpenAI has no word for an answer that was ended from outside."""
    return "abort" if reason == "cancelled" else reason
