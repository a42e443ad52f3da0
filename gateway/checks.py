"""What a request may ask of a world: the checks that rank 0 and the front share.

Called before a request is taken on. No request may be able to hurt a world by its numbers, so that everything a
world indexes with is checked here.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from gateway.grammars import MAX_GRAMMAR_CHARACTERS, problem_of
from gateway.protocol import MAX_MESSAGE_BYTES, Limits, SamplingParams, Submit

MAX_LOGIT_BIAS = 1024
_PLAIN = SamplingParams()
_BYTES_OF_A_LOGPROB = 16
"""Of one alternative as msgpack has it: an id, a float, and its share of the rest."""


class Problem(NamedTuple):
    """What is wrong, and with which field of the request."""

    field: str
    message: str


def check_submit(submit: Submit, limits: Limits) -> str | None:
    """What is wrong with a request of token ids for a world with these limits; None if nothing is."""
    if submit.prompt is not None:
        return "a text prompt: rank 0 takes prompt_token_ids only; send text to the front"
    if submit.stop:
        return "stop strings: rank 0 knows token ids only; send them to the front, or use stop_token_ids"
    if submit.deadline_s is not None:
        return "deadline_s: rank 0 keeps no deadlines; send it to the front, or send cancel"
    if submit.continuation is not None:
        return "a continuation of text: rank 0 takes token ids only; send text to the front"
    if submit.messages:
        return "a conversation: rank 0 takes prompt_token_ids only; send messages to the front"
    if submit.credit is not None:
        return "credit: rank 0 sends every token at once; leave it out, or send the request to the front"
    if submit.params.pooling is None and len(submit.output_token_ids) >= submit.params.max_tokens:
        return (
            f"{len(submit.output_token_ids)} output tokens are given, "
            f"max_tokens {submit.params.max_tokens} leaves none to generate"
        )
    grammar = submit.params.grammar
    if grammar is not None and len(grammar) > MAX_GRAMMAR_CHARACTERS + 1000:
        return f"a grammar of {len(grammar)} characters; allowed: up to {MAX_GRAMMAR_CHARACTERS}"
    largest = max(submit.output_token_ids, default=0)
    if largest >= limits.vocab_size:
        return f"token id {largest} is not in the vocabulary of {limits.vocab_size} tokens"
    problem = check_prompt(submit.prompt_token_ids, submit.params.num_new_tokens, limits)
    if problem is not None:
        return problem
    if (
        problem := check_pooling(submit.params, len(submit.prompt_token_ids), submit.output_token_ids)
    ) is not None:
        return problem
    found = check_params(submit.params, limits, len(submit.prompt_token_ids))
    return found and found.message


def check_request(
    prompt_token_ids: list[int],
    params: SamplingParams,
    stop: list[str],
    output_token_ids: list[int],
    limits: Limits | None,
) -> str | None:
    """What is wrong with a request at the front, whose worlds have had these limits; None if nothing is."""
    if not all(stop):
        return "a stop string is empty"
    if (problem := check_pooling(params, len(prompt_token_ids), output_token_ids)) is not None:
        return problem
    if params.pooling is not None and stop:
        return "stop strings have no meaning with pooling, which generates nothing"
    if params.pooling is None and len(output_token_ids) >= params.max_tokens:
        return f"{len(output_token_ids)} output tokens are given already, max_tokens is {params.max_tokens}"
    if params.grammar is not None and (problem := problem_of(params.grammar)) is not None:
        return problem
    if limits is None:
        return None
    if max(output_token_ids, default=0) >= limits.vocab_size:
        return f"an output token id is not in the vocabulary of {limits.vocab_size} tokens"
    problem = check_prompt(prompt_token_ids, params.num_new_tokens, limits)
    if problem is not None:
        return problem
    found = check_params(params, limits, len(prompt_token_ids))
    return found and found.message


def check_pooling(params: SamplingParams, num_prompt_tokens: int, output_token_ids: list[int]) -> str | None:
    """What is wrong with a request for numbers about its prompt; None if nothing is, or if it is none."""
    pooling = params.pooling
    if pooling is None:
        return None
    if output_token_ids:
        return f"{len(output_token_ids)} output tokens are given; with pooling there are none"
    plain = msgspec.structs.replace(
        params, pooling=None, seed=None, max_tokens=_PLAIN.max_tokens, temperature=_PLAIN.temperature
    )
    for name in plain.__struct_fields__:
        if getattr(plain, name) != getattr(_PLAIN, name):
            return f"{name} has no meaning with pooling, which generates nothing; leave it out"
    if pooling.kind == "score" and not 1 <= pooling.first_scored < num_prompt_tokens:
        return (
            f"pooling.first_scored is {pooling.first_scored}; allowed: 1 to {num_prompt_tokens - 1}, the index of a "
            f"token of the prompt behind its first"
        )
    return None


def check_prompt(prompt_token_ids: list[int], max_tokens: int, limits: Limits) -> str | None:
    """What is wrong with the number or the range of a prompt's tokens; None if nothing is."""
    if not prompt_token_ids:
        return "the prompt is empty; at least one token is needed"
    largest = max(prompt_token_ids)
    if largest >= limits.vocab_size:
        return f"token id {largest} is not in the vocabulary of {limits.vocab_size} tokens"
    total = len(prompt_token_ids) + max_tokens
    asked = f"the prompt has {len(prompt_token_ids)} tokens"
    if max_tokens:
        asked += f" and max_tokens is {max_tokens}, {total} together"
    if total > limits.max_model_len:
        return f"{asked}; the maximum length of this model is {limits.max_model_len} tokens"
    if total > limits.kv_cache_tokens:
        return f"{asked}; the KV cache holds {limits.kv_cache_tokens} tokens (--kv-cache-memory)"
    return None


def check_params(params: SamplingParams, limits: Limits, num_prompt_tokens: int) -> Problem | None:
    """What is wrong with parameters that are in range by themselves; None if nothing is."""
    if params.min_tokens > params.max_tokens:
        return Problem("min_tokens", f"min_tokens is {params.min_tokens}; allowed: up to {params.max_tokens}")
    if len(params.logit_bias) > MAX_LOGIT_BIAS:
        text = f"logit_bias has {len(params.logit_bias)} tokens; allowed: up to {MAX_LOGIT_BIAS}"
        return Problem("logit_bias", text)
    for field, token_ids in (
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
        ("allowed_token_ids", params.allowed_token_ids or []),
        ("bad_words", [token_id for word in params.bad_words for token_id in word]),
    ):
        for token_id in token_ids:
            if not 0 <= token_id < limits.vocab_size:
                text = f"{field}: token id {token_id} is not in the vocabulary; allowed: 0 to {limits.vocab_size - 1}"
                return Problem(field, text)
    if params.prompt_logprobs is not None:
        # All of them travel in one message.
        most = MAX_MESSAGE_BYTES // 2 // _BYTES_OF_A_LOGPROB // (params.prompt_logprobs + 2)
        if num_prompt_tokens > most:
            text = (
                f"the prompt has {num_prompt_tokens} tokens; with {params.prompt_logprobs} alternatives to each "
                f"prompt_logprobs allows up to {most}"
            )
            return Problem("prompt_logprobs", text)
    return None
