"""Draws the tokens of a step: shaping, grammars, sampling, log-probabilities, in that order of a row's life.

One instance at the sampling rank, used by its stage runner. All it holds can be rebuilt from a sequence's tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.execution.batch import Batch
from engine.execution.grammar import Grammars
from engine.execution.logprobs import token_logprobs
from engine.execution.sampling import sample
from engine.execution.shaping import shape
from engine.plan import StepPlan, TokenLogprobs


class Sampler:
    """See the module."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars

    def show_progress_to(self, on_progress: Callable[[], None]) -> None:
        """`on_progress` is called in the middle of what may take long in a step."""
        self._grammars.on_progress = on_progress

    def apply(self, plan: StepPlan) -> None:
        """Takes note of sequences that come and go."""
        self._grammars.apply(plan)

    def draw(
        self, logits: torch.Tensor, batch: Batch, plan: StepPlan
    ) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Tokens from `logits` `[num_sampled, vocab_size]` float32, which are overwritten, and what was asked about
        them."""
        asking = [row for row, params in enumerate(batch.sampling_params) if params.num_logprobs >= 0]
        raw = logits[asking] if asking else None
        handles = plan.sampling_handles
        for row, params in enumerate(batch.sampling_params):
            history = batch.sampling_history[row]
            if params.shaping is not None and history is not None:
                shape(logits[row], params.shaping, history, params.num_prompt_tokens)
            if params.grammar is not None:
                self._grammars.constrain(logits[row], handles[row])
        token_ids = sample(logits, batch.sampling_params, batch.sampling_positions)
        for row, params in enumerate(batch.sampling_params):
            if params.grammar is not None:
                self._grammars.advance(handles[row], token_ids[row])
        if raw is None:
            return token_ids, []
        num_top = [batch.sampling_params[row].num_logprobs for row in asking]
        answers = token_logprobs(raw, [token_ids[row] for row in asking], num_top)
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
        for row, answer in zip(asking, answers, strict=True):
            logprobs[row] = answer
        return token_ids, logprobs
