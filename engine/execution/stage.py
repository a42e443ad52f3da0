"""Runs one rank's stage over a plan: batch, hidden states in, layers, hidden states or tokens out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from engine.execution.batch import Batch, PooledRows, PromptRows, SequenceTable
from engine.execution.kv_cache import KVCache
from engine.execution.logprobs import token_logprobs
from engine.execution.pooling import Pooler
from engine.execution.sampler import Sampler
from engine.plan import PoolingKind, StepPlan, StepResult, TokenLogprobs
from engine.world import World

PROMPT_LOGPROB_ROWS = 64
"""Rows of logits that prompt log-probabilities hold at a time."""


class Stage(Protocol):
    """The layers that one rank computes: those of `engine.models.decoder`, or of a backend."""

    device: torch.device

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """What the first stage's layers begin with, for `[num_tokens]` tokens."""
        ...

    def layers(self, hidden: torch.Tensor, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Hidden states `[num_tokens, hidden_size]` float32 after the stage's last layer."""
        ...

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head sees of `[num_rows, hidden_size]`, float32."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's columns of the logits of `[num_rows, hidden_size]`, float32."""
        ...


class StageRunner:
    """What a rank does with each plan."""

    def __init__(
        self,
        world: World,
        stage: Stage,
        cache: KVCache,
        table: SequenceTable,
        hidden_size: int,
        vocab_widths: list[int],
        sampler: Sampler | None,
    ) -> None:
        self.sampler = sampler
        """At the sampling rank only."""
        self._pooler = None if sampler is None else Pooler()
        self._world = world
        self._stage = stage
        self.greatest: Callable[[torch.Tensor], torch.Tensor] | None = getattr(stage, "greatest", None)
        """Of stages that can tell the greatest logit without writing all of them: see NativeStage. Where it is None,
        as it must be on all ranks or on none, the sampler sees all logits."""
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
        if self._pooler is not None:
            self._pooler.apply(plan)
        hidden = self.forward(batch, plan.step)
        if hidden is None:
            return None
        # Every rank of the last stage computes its columns of the logits; the sampler gathers them.
        prompt_logprobs = {rows.handle: self._prompt_logprobs(hidden, rows) for rows in batch.prompt_rows}
        pooled = self._pool(hidden, batch.pooled_rows)
        if self.greatest is not None and batch.is_greedy:
            greedy = self._draw_greedily(self.greatest(hidden.index_select(0, batch.sampling_rows)))
            return None if greedy is None else StepResult(greedy, [], prompt_logprobs, pooled)
        logits = self.logits(hidden, batch.sampling_rows)
        if logits is None:
            return None
        assert self.sampler is not None, "logits arrived at a rank that does not sample"
        token_ids, logprobs = self.sampler.draw(logits, batch, plan)
        return StepResult(token_ids, logprobs, prompt_logprobs, pooled)

    def forward(self, batch: Batch, step: int) -> torch.Tensor | None:
        """Hidden states `[num_tokens, hidden_size]` float32 after the last layer; None at earlier stages, which
        have sent theirs on."""
        world, stage = self._world, self._stage
        if world.previous_stage is None:
            hidden = stage.embed(batch.token_ids)
        else:
            hidden = torch.empty(batch.num_tokens, self._hidden_size, device=stage.device)
            world.previous_stage.receive(hidden, step)
        hidden = stage.layers(hidden, batch, self._cache)
        if world.at.pp > 1:
            world.tensor_group.end_step()
        if world.next_stage is not None:
            world.next_stage.send(hidden, step)
            return None
        return hidden

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
        """Logits `[len(rows), vocab_size]` float32 at the sampler; None at the other ranks of the last stage."""
        if not len(rows):
            return hidden.new_empty(0, sum(self._vocab_widths)) if self._world.at.is_sampler else None
        local = self._stage.logits(hidden.index_select(0, rows))
        return self._world.tensor_group.gather(local, self._vocab_widths)

    def _draw_greedily(self, mine: torch.Tensor) -> list[int] | None:
        """Tokens of rows that take the greatest logit, from what each rank found in its columns: two numbers a row
        travel in place of a vocabulary. None at ranks that do not sample."""
        found = self._world.tensor_group.gather(mine, [2] * len(self._vocab_widths))
        if found is None:
            return None
        # Tokens are whole numbers far below 2**24, which float32 holds. Of equal ranks the first has the lower ids.
        values, tokens = found[:, ::2], found[:, 1::2]
        chosen = tokens.gather(1, values.argmax(dim=1, keepdim=True)) if values.shape[1] > 1 else tokens
        return [int(token) for token in chosen.flatten().tolist()]

    def _prompt_logprobs(self, hidden: torch.Tensor, rows: PromptRows) -> list[TokenLogprobs]:
        """In pieces: the logits of a whole prompt would take gigabytes."""
        found: list[TokenLogprobs] = []
        for targets, logits in self._logits_of(hidden, rows.begin, rows.targets):
            if logits is not None:
                found += token_logprobs(logits, targets, [rows.num_logprobs] * len(targets))
        return found

    def _logits_of(
        self, hidden: torch.Tensor, first: int, targets: list[int]
    ) -> Iterator[tuple[list[int], torch.Tensor | None]]:
        """Pieces of the tokens after rows `first` and on, each with its rows' logits at the sampler."""
        for begin in range(0, len(targets), PROMPT_LOGPROB_ROWS):
            piece = targets[begin : begin + PROMPT_LOGPROB_ROWS]
            rows = torch.arange(first + begin, first + begin + len(piece), device=hidden.device)
            yield piece, self.logits(hidden, rows)

    def _pool(self, hidden: torch.Tensor, chunks: list[PooledRows]) -> dict[int, bytes]:
        """What ended with this step, by handle, at the sampler. Every rank of the stage has the whole hidden states;
        only logits are gathered."""
        found = {}
        for rows in chunks:
            if rows.pooling.kind is PoolingKind.SCORE:
                for targets, logits in self._logits_of(hidden, rows.score_begin, rows.targets):
                    if self._pooler is not None and logits is not None:
                        self._pooler.add_scores(rows.handle, logits, targets)
            elif self._pooler is not None:
                # Of a last token alone nothing else is looked at.
                wanted = rows.begin if rows.pooling.kind is PoolingKind.MEAN else rows.end - 1
                self._pooler.add_states(rows, self._stage.final_norm(hidden[wanted : rows.end]))
            if self._pooler is not None and rows.is_last:
                found[rows.handle] = self._pooler.finish(rows)
        return found
