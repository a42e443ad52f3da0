"""Runs one rank's stage over a plan: batch, hidden states in, layers, hidden states or tokens out."""

from __future__ import annotations

import torch

from engine.execution.batch import Batch, SequenceTable
from engine.execution.kv_cache import KVCache
from engine.execution.sampling import sample
from engine.models.decoder import DecoderStage
from engine.plan import StepPlan
from engine.world import World


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
    ) -> None:
        self._world = world
        self._stage = stage
        self._cache = cache
        self._table = table
        self._hidden_size = hidden_size
        self._vocab_widths = vocab_widths
        """Columns of the logits that each tensor-parallel rank holds."""

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[int] | None:
        """The sampled ids in the order of `plan.sampling_handles` at the sampler; None at every other rank."""
        batch = self._table.apply(plan)
        logits = self.forward(batch)
        return None if logits is None else self.draw(logits, batch)

    def draw(self, logits: torch.Tensor, batch: Batch) -> list[int]:
        """Tokens from `logits` `[num_sampled, vocab_size]`, which it may overwrite."""
        return sample(logits, batch.sampling_params, batch.sampling_positions)

    def forward(self, batch: Batch) -> torch.Tensor | None:
        """Logits `[num_sampled, vocab_size]` float32 at the sampler; None at every other rank."""
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
        if not len(batch.sampling_rows):
            return hidden.new_empty(0, sum(self._vocab_widths)) if world.at.is_sampler else None
        local = stage.logits(hidden.index_select(0, batch.sampling_rows))
        return world.tensor_group.gather(local, self._vocab_widths)
