"""Changes to logits that depend on the tokens before: penalties, bias, minimum length, bad words.

Called at the sampler before tokens are drawn. All state is the sequence's tokens, so a replay rebuilds it.
"""

from __future__ import annotations

import torch

from engine.plan import LogitShaping


def shape(logits: torch.Tensor, shaping: LogitShaping, history: list[int], num_prompt_tokens: int) -> None:
    """Changes one row of logits `[vocab_size]` in place. `history` is the prompt and the output so far.

    Bias, minimum length and bad words come first, then the penalties, as in vLLM. The repetition penalty (CTRL,
    arXiv 1909.05858) looks at prompt and output, the other two (OpenAI) at the output alone.
    """
    output = history[num_prompt_tokens:]
    if shaping.logit_bias:
        ids = torch.tensor(list(shaping.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(shaping.logit_bias.values()), device=logits.device)
    if shaping.allowed_token_ids is not None:
        allowed = torch.tensor(shaping.allowed_token_ids, device=logits.device)
        kept = logits[allowed]
        logits.fill_(float("-inf"))
        logits[allowed] = kept
    if len(output) < shaping.min_tokens and shaping.ending_token_ids:
        logits[torch.tensor(shaping.ending_token_ids, device=logits.device)] = float("-inf")
    for word in shaping.bad_words:
        before = word[:-1]
        if len(before) <= len(history) and history[len(history) - len(before) :] == before:
            logits[word[-1]] = float("-inf")
    if shaping.repetition_penalty != 1.0 and history:
        ids = torch.tensor(list(set(history)), device=logits.device)
        seen = logits[ids]
        penalty = shaping.repetition_penalty
        logits[ids] = torch.where(seen < 0, seen * penalty, seen / penalty)
    if output and (shaping.presence_penalty or shaping.frequency_penalty):
        ids, counts = torch.tensor(output, device=logits.device).unique(return_counts=True)
        logits[ids] -= shaping.frequency_penalty * counts + shaping.presence_penalty
