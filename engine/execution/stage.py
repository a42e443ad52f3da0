"""Runs one rank's stage over a plan: batch, hidden states in, layers, hidden states or tokens out."""

from __future__ import annotations

import torch

from engine.execution.batch import Batch, PromptRows, SequenceTable
from engine.execution.kv_cache import KVCache
from engine.execution.logprobs import token_logprobs
from engine.execution.sampler import Sampler
from engine.models.decoder import DecoderStage
from engine.plan import StepPlan, StepResult, TokenLogprobs
from engine.world import World

PROMPT_LOGPROB_ROWS = 64
"""Rows of logits that prompt log-probabilities hold at a time."""


class StageRunner:
    """What a rank does with each plan."""

    def __init__(
        self,
        world: World,
        stage: DecoderStage,
        cache: KVCache,
        table: SequenceTable,
        hidden_size: int,
        vocab_widths: list[int],
        sampler: Sampler | None,
    ) -> None:
        self.sampler = sampler
        """At the sampling rank only."""
        self._world = world
        self._stage = stage
        self._cache = cache
        self._table = table
        self._hidden_size = hidden_size
        self._vocab_widths = vocab_widths
        """Columns of the logits that each tensor-parallel rank holds."""

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult | None:
        """What the plan brought at the sampler; None at every other rank."""
        batch = self._table.apply(plan)
        if self.sampler is not None:
            self.sampler.apply(plan)
        hidden = self.forward(batch)
        if hidden is None:
            return None
        # Every rank of the last stage computes its columns of the logits; the sampler gathers them.
        prompt_logprobs = {rows.handle: self._prompt_logprobs(hidden, rows) for rows in batch.prompt_rows}
        logits = self.logits(hidden, batch.sampling_rows)
        if logits is None:
            return None
        assert self.sampler is not None, "logits arrived at a rank that does not sample"
        token_ids, logprobs = self.sampler.draw(logits, batch, plan)
        return StepResult(token_ids, logprobs, prompt_logprobs)

    def forward(self, batch: Batch) -> torch.Tensor | None:
        """Hidden states `[num_tokens, hidden_size]` float32 after the last layer; None at earlier stages, which
        have sent theirs on."""
        world, stage = self._world, self._stage
        if world.previous_stage is None:
            hidden = stage.embed(batch.token_ids)
        else:
            hidden = torch.empty(batch.num_tokens, self._hidden_size, device=stage.device)
            world.previous_stage.receive(hidden)
        hidden = stage.layers(hidden, batch, self._cache)
        if world.next_stage is not None:
            world.next_stage.send(hidden)
            return None
        return hidden

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
        """Logits `[len(rows), vocab_size]` float32 at the sampler; None at the other ranks of the last stage."""
        if not len(rows):
            return hidden.new_empty(0, sum(self._vocab_widths)) if self._world.at.is_sampler else None
        local = self._stage.logits(hidden.index_select(0, rows))
        return self._world.tensor_group.gather(local, self._vocab_widths)

    def _prompt_logprobs(self, hidden: torch.Tensor, rows: PromptRows) -> list[TokenLogprobs]:
        """In pieces: the logits of a whole prompt would take gigabytes."""
        found: list[TokenLogprobs] = []
        for begin in range(0, len(rows.targets), PROMPT_LOGPROB_ROWS):
            targets = rows.targets[begin : begin + PROMPT_LOGPROB_ROWS]
            first = rows.begin + begin
            logits = self.logits(hidden, torch.arange(first, first + len(targets), device=hidden.device))
            if logits is not None:
                found += token_logprobs(logits, targets, [rows.num_logprobs] * len(targets))
        return found
