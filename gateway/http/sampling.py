"""From the fields of a request to the parameters of its tokens, each checked against its range.

Used by the OpenAI endpoints. Every refusal names the field and what is allowed.
"""

from __future__ import annotations

import math

from gateway.checks import MAX_LOGIT_BIAS
from gateway.http.errors import ApiError
from gateway.http.schema import ChatRequest, CommonRequest, CompletionRequest, check
from gateway.protocol import SamplingParams
from gateway.text import TextModel

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 4096
MAX_STOP_TOKEN_IDS = 256
MAX_ALLOWED_TOKEN_IDS = 4096
MAX_BAD_WORDS = 128
"""Each may be two token sequences, with and without a space before it."""
MAX_BAD_WORD_CHARACTERS = 256
MAX_TIMEOUT_S = 86_400.0
MAX_ANSWER_LOGPROBS = 2**22
"""In one answer: some 100 bytes each as JSON, and as much before."""


def sampling_params(request: CommonRequest, max_tokens: int) -> SamplingParams:
    """The parameters of the first choice, without bad words. Raises ApiError for values out of range."""
    temperature = _or(request.temperature, 1.0)
    top_p = _or(request.top_p, 1.0)
    top_k = 0 if request.top_k is None else request.top_k
    min_p = _or(request.min_p, 0.0)
    presence = _or(request.presence_penalty, 0.0)
    frequency = _or(request.frequency_penalty, 0.0)
    repetition = _or(request.repetition_penalty, 1.0)
    stop_token_ids = request.stop_token_ids or []
    check(0 <= temperature <= 2, "temperature", temperature, "from 0 to 2")
    check(0 < top_p <= 1, "top_p", top_p, "above 0, at most 1")
    check(-1 <= top_k < 2**31, "top_k", top_k, "at least 1, or 0 or -1 for all tokens")
    check(0 <= min_p <= 1, "min_p", min_p, "from 0 to 1")
    check(-2 <= presence <= 2, "presence_penalty", presence, "from -2 to 2")
    check(-2 <= frequency <= 2, "frequency_penalty", frequency, "from -2 to 2")
    check(0 < repetition <= 100, "repetition_penalty", repetition, "above 0, at most 100")
    check(request.seed is None or -(2**63) <= request.seed < 2**63, "seed", request.seed, "64-bit integers")
    check(len(stop_token_ids) <= MAX_STOP_TOKEN_IDS, "stop_token_ids", "a list", f"{MAX_STOP_TOKEN_IDS} ids")
    check(all(0 <= token < 2**31 for token in stop_token_ids), "stop_token_ids", "an id", "token ids")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=max(top_k, 0),
        seed=request.seed,
        min_p=min_p,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=_logit_bias(request),
        min_tokens=_min_tokens(request, max_tokens),
        ignore_eos=bool(request.ignore_eos),
        stop_token_ids=stop_token_ids,
        logprobs=asked_logprobs(request),
        prompt_logprobs=asked_prompt_logprobs(request),
        allowed_token_ids=_allowed_token_ids(request),
        skip_special_tokens=request.skip_special_tokens is not False,
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
    )


def check_sampling(request: CommonRequest) -> SamplingParams:
    """Refuses what is wrong in itself, before anything waits for a world. Returns the parameters for an answer of any
    length, which `check_length` is for. Raises ApiError."""
    params = sampling_params(request, 2**31 - 1)
    num_candidates(request)
    stop_strings(request)
    priority(request)
    timeout_s(request)
    words = request.bad_words or []
    check(len(words) <= MAX_BAD_WORDS, "bad_words", f"{len(words)} words", f"up to {MAX_BAD_WORDS}")
    allowed = f"words of 1 to {MAX_BAD_WORD_CHARACTERS} characters beside leading spaces"
    for word in words:
        check(
            0 < len(word.lstrip()) <= MAX_BAD_WORD_CHARACTERS, "bad_words", f"a word {word[:20]!r}", allowed
        )
    return params


def check_length(request: CommonRequest, max_tokens: int) -> None:
    """Refuses what does not go with an answer of this length. Raises ApiError."""
    _min_tokens(request, max_tokens)


def bad_words(request: CommonRequest, text: TextModel) -> list[list[int]]:
    """The token sequences of the words that must not appear: at the beginning of a text, and behind a space, if
    that is a token sequence of the same length (as vLLM has it). Raises ApiError."""
    sequences: list[list[int]] = []
    for word in request.bad_words or []:
        try:
            bare = text.encode(word.lstrip(), add_special_tokens=False)
            spaced = text.encode(" " + word.lstrip(), add_special_tokens=False)
        except ValueError as error:
            raise ApiError(400, str(error), param="bad_words") from None
        sequences += [bare] if bare else []
        if bare and spaced[0] != bare[0] and len(spaced) == len(bare):
            sequences.append(spaced)
    return sequences


def asked_logprobs(request: CommonRequest) -> int | None:
    """Alternatives to show with each token of the answer; None to show no log-probabilities. Raises ApiError."""
    if isinstance(request, ChatRequest):
        top = request.top_logprobs or 0
        check(0 <= top <= MAX_LOGPROBS, "top_logprobs", top, f"from 0 to {MAX_LOGPROBS}")
        if top and not request.logprobs:
            raise ApiError(400, "top_logprobs is only allowed with logprobs: true", param="top_logprobs")
        return top if request.logprobs else None
    count = request.logprobs if isinstance(request, CompletionRequest) else None
    if count is None or count is False:
        return None
    ok = count is not True and 0 <= count <= MAX_LOGPROBS
    check(ok, "logprobs", str(count).lower(), f"from 0 to {MAX_LOGPROBS}")
    return int(count)


def asked_prompt_logprobs(request: CommonRequest) -> int | None:
    """Alternatives to show with each token of the prompt. Raises ApiError."""
    count = request.prompt_logprobs
    if count is not None:
        check(0 <= count <= MAX_LOGPROBS, "prompt_logprobs", count, f"from 0 to {MAX_LOGPROBS}")
        if request.stream:
            text = (
                "prompt_logprobs is not available in a stream; ask without stream, or for echo with logprobs"
            )
            raise ApiError(400, text, param="prompt_logprobs")
    return count


def check_answer_size(
    params: SamplingParams, num_prompt_tokens: int, num_prompts: int, num_choices: int, streams: bool
) -> None:
    """Refuses an answer that would take too much of the front's memory. `num_prompt_tokens` is over all prompts. A
    stream has its tokens' log-probabilities sent on at once. Raises ApiError."""
    count = 0
    if params.prompt_logprobs is not None:
        shown = num_choices if streams else 1
        count += num_prompt_tokens * shown * (params.prompt_logprobs + 2)
    if params.logprobs is not None and not streams:
        count += num_prompts * num_choices * params.max_tokens * (params.logprobs + 2)
    if count > MAX_ANSWER_LOGPROBS:
        text = f"the answer may have {count} log-probabilities, over all prompts, choices and alternatives"
        remedy = "ask for fewer of them or for fewer tokens" + ("" if streams else ", or for a stream")
        field = "logprobs" if params.logprobs is not None else "prompt_logprobs"
        raise ApiError(
            400, f"{text}; allowed: {MAX_ANSWER_LOGPROBS}: {remedy}", param=field, code="invalid_value"
        )


def num_candidates(request: CommonRequest) -> int:
    """How many answers are made for each prompt, of which `n` are shown. Raises ApiError."""
    count = num_choices(request)
    best_of = request.best_of if isinstance(request, CompletionRequest) else None
    if best_of is None or best_of == count:
        return count
    check(count <= best_of <= MAX_CHOICES, "best_of", best_of, f"from n, here {count}, to {MAX_CHOICES}")
    if request.stream:
        raise ApiError(400, "best_of greater than n cannot be streamed", param="best_of")
    return best_of


def num_choices(request: CommonRequest) -> int:
    """How many answers to each prompt. Raises ApiError."""
    count = 1 if request.n is None else request.n
    check(1 <= count <= MAX_CHOICES, "n", count, f"from 1 to {MAX_CHOICES}")
    return count


def stop_strings(request: CommonRequest) -> list[str]:
    """The stop strings. Raises ApiError."""
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    check(len(stop) <= MAX_STOP_STRINGS, "stop", f"{len(stop)} strings", f"up to {MAX_STOP_STRINGS}")
    allowed = f"strings of 1 to {MAX_STOP_CHARACTERS} characters"
    for text in stop:
        check(0 < len(text) <= MAX_STOP_CHARACTERS, "stop", f"a string of {len(text)} characters", allowed)
    return stop


def priority(request: CommonRequest) -> int:
    """Lower is served first. Raises ApiError."""
    value = 0 if request.priority is None else request.priority
    check(-(2**31) <= value < 2**31, "priority", value, "32-bit integers")
    return value


def timeout_s(request: CommonRequest) -> float | None:
    """Seconds that the request may take; None for no limit. Raises ApiError."""
    value = request.timeout
    if value is not None:
        check(0 < value <= MAX_TIMEOUT_S, "timeout", value, f"above 0, at most {MAX_TIMEOUT_S:g} seconds")
    return value


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _logit_bias(request: CommonRequest) -> dict[int, float]:
    bias = request.logit_bias or {}
    check(len(bias) <= MAX_LOGIT_BIAS, "logit_bias", f"{len(bias)} tokens", f"up to {MAX_LOGIT_BIAS}")
    result = {}
    for name, value in bias.items():
        is_id = name.isascii() and name.isdecimal() and len(name) <= 10
        check(is_id, "logit_bias", f"a map with the key {name[:20]!r}", "token ids, in decimal, as keys")
        check(math.fabs(value) <= 100, "logit_bias", f"{value} for token {name}", "from -100 to 100")
        result[int(name)] = value
    return result


def _allowed_token_ids(request: CommonRequest) -> list[int] | None:
    allowed = request.allowed_token_ids
    if allowed is not None:
        text = f"up to {MAX_ALLOWED_TOKEN_IDS} token ids, at least one"
        check(0 < len(allowed) <= MAX_ALLOWED_TOKEN_IDS, "allowed_token_ids", f"{len(allowed)} ids", text)
        check(all(0 <= token < 2**31 for token in allowed), "allowed_token_ids", "an id", "token ids")
    return allowed


def truncated(request: CommonRequest, prompt: list[int], max_model_len: int) -> list[int]:
    """The end of a prompt that `truncate_prompt_tokens` leaves; -1: as much as the model's length. Raises
    ApiError."""
    most = request.truncate_prompt_tokens
    if most is None:
        return prompt
    check(most == -1 or 1 <= most < 2**31, "truncate_prompt_tokens", most, "at least 1, or -1")
    return prompt[-(max_model_len - 1 if most == -1 else most) :]


def _min_tokens(request: CommonRequest, max_tokens: int) -> int:
    value = 0 if request.min_tokens is None else request.min_tokens
    check(0 <= value <= max_tokens, "min_tokens", value, f"from 0 to max_tokens, here {max_tokens}")
    return value
