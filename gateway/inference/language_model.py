"""The served language model as a model of the Open Inference Protocol V2: texts in, texts out.

Its requests are calls in the journal like those of the OpenAI endpoints, so that they go on in the next world when
one dies. Input and output names are those of Triton's vLLM backend.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.call_ids import new_call_id
from gateway.calls import Calls, Conditions, OnDisconnect, Wanted
from gateway.checks import check_params, check_prompt
from gateway.errors import RequestFailed
from gateway.http.errors import ApiError, from_failure
from gateway.http.openai import Deadline, OpenAI
from gateway.http.reading import Reading, Target
from gateway.http.sampling import (
    bad_words,
    check_sampling,
    priority,
    sampling_params,
    stop_strings,
    timeout_s,
)
from gateway.http.schema import COMPLETION_MAX_TOKENS, MAX_PROMPTS, CompletionRequest, asked_max_tokens
from gateway.http.streams import HEAD_S, KEEP_ALIVE_S, OUTAGE_CHECK_S, Collector, EventQueue, Reader
from gateway.http.structured import constraint
from gateway.inference.models import (
    InferRequest,
    ModelSpec,
    Part,
    TensorSpec,
    choose_outputs,
    take_inputs,
)
from gateway.inference.tensors import BYTES, Tensor
from gateway.journal import JournalCall
from gateway.protocol import SamplingParams
from gateway.rank0 import with_seed

CALL_KIND = "v2"
PARAMETERS = {
    "max_tokens": "INT32",
    "min_tokens": "INT32",
    "temperature": "FP32",
    "top_p": "FP32",
    "top_k": "INT32",
    "min_p": "FP32",
    "seed": "INT64",
    "stop": BYTES,
    "stop_token_ids": "INT32",
    "bad_words": BYTES,
    "presence_penalty": "FP32",
    "frequency_penalty": "FP32",
    "repetition_penalty": "FP32",
    "ignore_eos": "BOOL",
}
"""What may be a parameter, a field of `generate`, or an input of this type."""
STRUCTURES = (
    "logit_bias",
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
"""What may be a parameter or a field, but no tensor."""
_LISTS = ("stop", "stop_token_ids", "bad_words")
_UNMEANT: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "prompt_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "details": (False,),
}
"""Sampling parameters that ask for more than `text_output` can show, and what each may be."""
_ALLOWED = {*PARAMETERS, *STRUCTURES, "priority", "timeout"}


@dataclass(frozen=True)
class _Asked:
    """A request, read."""

    texts: list[str]
    shape: list[int]
    stream: bool | None
    with_input: bool
    sampling: CompletionRequest


@dataclass(frozen=True)
class LanguageModel:
    """The model of the active world."""

    openai: OpenAI
    calls: Calls
    reason: Callable[[], str | None]
    """Why the server is not ready."""

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            self.openai.model,
            "phalanx",
            (
                TensorSpec("text_input", BYTES, (-1,)),
                TensorSpec("stream", "BOOL", (1,), optional=True),
                TensorSpec("sampling_parameters", BYTES, (1,), optional=True),
                TensorSpec("exclude_input_in_output", "BOOL", (1,), optional=True),
                *(
                    TensorSpec(name, datatype, (-1,) if name in _LISTS else (1,), optional=True)
                    for name, datatype in PARAMETERS.items()
                ),
            ),
            (
                TensorSpec("text_output", BYTES, (-1,)),
                TensorSpec("finish_reason", BYTES, (-1,)),
                TensorSpec("num_output_tokens", "UINT32", (-1,)),
            ),
            decoupled=True,
        )

    def why_not_ready(self) -> str | None:
        return self.reason()

    async def infer(self, request: InferRequest) -> list[Tensor]:
        asked = self._read(request)
        if asked.stream:
            raise ApiError(400, "stream is true; ask with generate_stream or ModelStreamInfer for a stream")
        return choose_outputs(self.spec, request, await self._whole(asked))

    async def stream(self, request: InferRequest) -> AsyncGenerator[Part | None, None]:
        asked = self._read(request)
        if asked.stream is False:
            yield Part(choose_outputs(self.spec, request, await self._whole(asked)), is_last=True)
            return
        if len(asked.texts) != 1:
            text = f"text_input has {len(asked.texts)} texts; a stream is the answer to one"
            raise ApiError(400, text)
        queue = EventQueue()
        reader = await self._begin(asked, queue)
        before = asked.texts[0] if asked.with_input else ""
        wait_s = HEAD_S
        try:
            while True:
                events = await queue.take(wait_s)
                for _, output, _ in events:
                    text, before = before + (output.text or ""), ""
                    ended = output.finish_reason is not None
                    outputs = _outputs([1], [(text, output.finish_reason, len(output.token_ids))])
                    yield Part(choose_outputs(self.spec, request, outputs), is_last=ended)
                    if ended:
                        return
                if queue.error is not None:
                    raise from_failure(queue.error)
                wait_s = KEEP_ALIVE_S if reader.is_in_world else OUTAGE_CHECK_S
                if not events and reader.is_in_world:
                    yield None
        finally:
            reader.cancel()

    # ----------------------------------------------------------------------- inside

    async def _whole(self, asked: _Asked) -> list[Tensor]:
        collector = Collector(len(asked.texts))
        reader = await self._begin(asked, collector)
        try:
            await collector.done
        except RequestFailed as error:
            raise from_failure(error) from None
        finally:
            reader.cancel()
        answers = []
        for text, choice in zip(asked.texts, collector.choices, strict=True):
            shown = text + choice.text if asked.with_input else choice.text
            answers.append((shown, choice.finish_reason, choice.num_tokens))
        return _outputs(asked.shape, answers)

    def _read(self, request: InferRequest) -> _Asked:
        inputs = take_inputs(self.spec, request)
        given = inputs.pop("text_input")
        flat = len(given.shape) == 1 or (len(given.shape) == 2 and given.shape[1] == 1)
        if not flat or not 1 <= given.shape[0] <= MAX_PROMPTS:
            text = f"unexpected shape for input 'text_input' for model '{self.spec.name}': got {given.shape}"
            raise ApiError(400, f"{text}, allowed: [1] to [{MAX_PROMPTS}], or [1, 1] to [{MAX_PROMPTS}, 1]")
        texts = [_text(value, "text_input") for value in given.values()]
        fields = dict(request.parameters)
        for name, tensor in inputs.items():
            if tensor.num_elements > MAX_PROMPTS:
                raise ApiError(400, f"input '{name}' has {tensor.num_elements} elements, too many")
            values = tensor.values()
            if tensor.datatype == BYTES:
                values = [_text(value, name) for value in values]
            if name not in _LISTS and len(values) != 1:
                raise ApiError(400, f"input '{name}' has {len(values)} elements; allowed: 1")
            fields[name] = values if name in _LISTS else values[0]
        stream = _flag(fields.pop("stream", None), "stream")
        excluded = _flag(fields.pop("exclude_input_in_output", None), "exclude_input_in_output")
        sampling = _sampling_request(fields)
        check_sampling(sampling)
        asked_max_tokens(sampling.max_tokens, "max_tokens")
        return _Asked(texts, given.shape, stream, excluded is False, sampling)

    async def _begin(self, asked: _Asked, target: Target) -> Reader:
        """Takes the request on. Raises ApiError."""
        request, openai = asked.sampling, self.openai
        wanted = constraint(request)
        grammar = None if wanted is None else await asyncio.to_thread(wanted.compile)
        deadline = Deadline(timeout_s(request))
        limits = await openai.limits(deadline)
        prompts = await openai.encode_prompts(list(asked.texts), "text_input", limits)
        max_tokens = COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        for prompt in prompts:
            if (problem := check_prompt(prompt, max_tokens, limits)) is not None:
                raise ApiError(400, problem)
        base = sampling_params(request, max_tokens)
        base = msgspec.structs.replace(base, bad_words=bad_words(request, openai.text), grammar=grammar)
        if (found := check_params(base, limits, max(map(len, prompts)))) is not None:
            raise ApiError(400, found.message)
        most = openai.requests.waiting.max_requests
        if len(prompts) > most:
            raise ApiError(400, f"{len(prompts)} texts in one request; allowed: {most} (--max-waiting)")
        conditions = Conditions(
            stop_strings(request), priority(request), deadline.left_s(), deadline.timeout_s
        )
        return self._take_on(prompts, base, conditions, target)

    def _take_on(
        self, prompts: list[list[int]], params: SamplingParams, conditions: Conditions, target: Target
    ) -> Reader:
        record = JournalCall(
            f"{CALL_KIND}-{new_call_id()}",
            CALL_KIND,
            time.time(),
            on_disconnect=OnDisconnect.CANCEL,  # by nothing could its client find it again
        )
        wanted = [Wanted(prompt, with_seed(params)) for prompt in prompts]
        try:
            call = self.calls.begin(record, wanted, conditions)
        except RequestFailed as error:
            raise from_failure(error) from None
        welcome = self.openai.requests.welcome
        eos_token_ids = welcome.eos_token_ids if welcome is not None else ()
        reading = Reading(record, target, self.openai.text, eos_token_ids, shows_logprobs=False)
        call.listen(reading)
        return Reader(self.calls, call, reading)


def _outputs(shape: list[int], answers: list[tuple[str, str | None, int]]) -> list[Tensor]:
    """Of text, finish reason (none yet: empty) and number of new tokens of each."""
    return [
        Tensor("text_output", BYTES, shape, [text.encode() for text, _, _ in answers]),
        Tensor("finish_reason", BYTES, shape, [(reason or "").encode() for _, reason, _ in answers]),
        Tensor("num_output_tokens", "UINT32", shape, [count for _, _, count in answers]),
    ]


def _sampling_request(fields: dict[str, Any]) -> CompletionRequest:
    """Out of parameters. Those that nobody knows here are left out, as the protocol has it. Raises ApiError."""
    chosen = fields
    if (packed := fields.pop("sampling_parameters", None)) is not None:
        try:
            unpacked = msgspec.json.decode(packed, type=dict[str, Any])
        except (msgspec.DecodeError, TypeError, UnicodeError, RecursionError) as error:
            raise ApiError(400, f"sampling_parameters is no JSON object: {error}") from None
        unpacked.pop("timeout", None)
        chosen = {**unpacked, **fields}
    for name, allowed in _UNMEANT.items():
        if chosen.get(name) not in (None, *allowed):
            raise ApiError(400, f"{name} is not supported by V2 requests; use /v1/completions for it")
    if (timeout_us := chosen.get("timeout")) is not None:
        if isinstance(timeout_us, bool) or not isinstance(timeout_us, int | float) or not timeout_us >= 0:
            raise ApiError(400, "timeout is not a number of microseconds")
        chosen = {**chosen, "timeout": timeout_us / 1e6 if timeout_us else None}
    kept = {name: value for name, value in chosen.items() if name in _ALLOWED}
    try:
        return msgspec.convert({**kept, "prompt": ""}, CompletionRequest, strict=False)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        raise ApiError(400, f"parameters: {error}") from None


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"input '{name}' is not valid UTF-8: {error}") from None


def _flag(value: object, name: str) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ApiError(400, f"{name} is {repr(value)[:40]}; allowed: true, false")
