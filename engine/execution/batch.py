"""From a plan to the tensors of one step. Every rank keeps the same table of sequences and builds the same batch.

The stage runner calls `SequenceTable.apply` once a plan. Layers read the result; nothing here is rank-specific.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from engine.plan import Chunk, Pooling, PoolingKind, SequenceParams, StepPlan

LEAST_UNWANTED_ROWS = 16
"""Fewer are computed in the last layer with the others: reading its weights once more would cost as much."""


@dataclass(frozen=True)
class DecodeGroup:
    """Decode rows of similar context length, attended to together."""

    rows: slice | torch.Tensor
    """Which rows of the batch: int64 `[num_rows]`, or a slice when that is all of them in order."""
    slots: torch.Tensor
    """`[num_rows * max_context]` int64: where each context token lies in the cache; padding points at slot 0."""
    mask: torch.Tensor
    """`[num_rows, 1, 1, max_context]` bool: true where a context token is."""


@dataclass(frozen=True)
class ChunkContext:
    """One chunk of a prompt: rows `begin:end` of the batch attend to `start` earlier tokens and causally to
    themselves."""

    begin: int
    end: int
    start: int
    slots: torch.Tensor | None
    """`[start + end - begin]` int64 cache slots of the whole context; None when there is nothing before."""
    mask: torch.Tensor | None = None
    """`[end - begin, num_keys]` bool: true where a row may look. Attention makes it once a step; None: causal."""


@dataclass(frozen=True)
class PagedRows:
    """Which rows belong to which sequence, and where its blocks stand: what native kernels read in place of
    decode groups and chunks. int64 throughout."""

    first_rows: np.ndarray
    """`[num_sequences + 1]`: the rows of sequence i are `first_rows[i]` to `first_rows[i + 1]` - 1."""
    handles: np.ndarray
    """`[num_sequences]`: the row of the sequence in `block_tables`."""
    block_tables: np.ndarray
    """`[max_num_seqs, max_blocks]`: the table's own."""


@dataclass(frozen=True)
class PromptRows:
    """Rows of a chunk whose next tokens are known and whose log-probabilities were asked for."""

    handle: int
    begin: int
    targets: list[int]
    """The token after each row, from row `begin` on."""
    num_logprobs: int


@dataclass(frozen=True)
class PooledRows:
    """A chunk of a sequence that is pooled: rows `begin:end` of the batch."""

    handle: int
    begin: int
    end: int
    pooling: Pooling
    is_last: bool
    """The sequence ends with this chunk."""
    score_begin: int
    """With SCORE: the row whose next token is the first of `targets`."""
    targets: list[int]


@dataclass(frozen=True)
class Batch:
    """The tokens of one step, decode rows first, then the chunks one after another."""

    token_ids: torch.Tensor
    """`[num_tokens]` int64."""
    positions: torch.Tensor
    """`[num_tokens]` int64."""
    slots: torch.Tensor
    """`[num_tokens]` int64: where each token's keys and values are written."""
    decode_groups: list[DecodeGroup]
    chunks: list[ChunkContext]
    sampling_rows: torch.Tensor
    """`[num_sampled]` int64: rows whose logits are needed."""
    sampling_params: list[SequenceParams]
    sampling_positions: list[int]
    """Absolute position of each token that will be drawn."""
    sampling_history: list[list[int] | None]
    """All tokens before the one drawn, for rows with logit shaping; the table's own lists, not to be changed."""
    prompt_rows: list[PromptRows]
    pooled_rows: list[PooledRows]
    paged: PagedRows
    wanted_rows: torch.Tensor | None = None
    """Ascending int64 `[num_wanted]`: rows whose hidden states anybody looks at after the last layer. None: all, or
    so many that leaving out the others is not worth the trouble."""

    def rows(self, wanted: torch.Tensor) -> Batch:
        """What native kernels read of the batch, for some of its rows, ascending. What else it has is unchanged."""
        first_rows = np.searchsorted(wanted.numpy(), self.paged.first_rows)
        return replace(
            self,
            token_ids=self.token_ids[wanted],
            positions=self.positions[wanted],
            slots=self.slots[wanted],
            paged=replace(self.paged, first_rows=first_rows.astype(np.int64)),
        )

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def is_greedy(self) -> bool:
        """There are rows to sample, each takes the token with the greatest logit, and nobody asks for more."""
        return bool(self.sampling_params) and all(
            params.temperature <= 0
            and params.num_logprobs < 0
            and params.shaping is None
            and params.grammar is None
            for params in self.sampling_params
        )


class SequenceTable:
    """Block tables, lengths and parameters of the running sequences, by handle."""

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
        for_gathering: bool = True,
    ) -> None:
        """`for_gathering`: layers gather contexts from the cache by slots and masks; else they read `paged`."""
        self._block_size = block_size
        self._device = device
        self._for_gathering = for_gathering
        self._blocks = np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int64)
        self._num_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_computed = np.zeros(max_num_seqs, dtype=np.int64)
        self._params: dict[int, SequenceParams] = {}
        self._history: dict[int, list[int]] = {}
        """Every token so far, of sequences with logit shaping only."""
        self._offsets = np.arange(block_size, dtype=np.int64)

    def apply(self, plan: StepPlan) -> Batch:
        """Brings the table up to the plan and builds its batch."""
        for handle in plan.released:
            self._params.pop(handle, None)
            self._history.pop(handle, None)
        for handle, params in plan.admitted:
            self._params[handle] = params
            if params.shaping is not None:
                self._history[handle] = list(params.skipped_tokens)
            self._num_blocks[handle] = 0
            self._num_computed[handle] = 0
        for row, block in plan.decode_blocks:
            self._append_blocks(plan.decode_handles[row], [block])

        token_ids = list(plan.decode_tokens)
        handles = np.array(plan.decode_handles, dtype=np.int64)
        decode_positions = self._num_computed[handles]
        positions = [decode_positions]
        blocks = self._blocks[handles, decode_positions // self._block_size]
        slots = [blocks * self._block_size + decode_positions % self._block_size]
        groups = self._decode_groups(handles, decode_positions + 1) if self._for_gathering else []
        self._num_computed[handles] = decode_positions + 1

        if self._history:
            for handle, token in zip(plan.decode_handles, plan.decode_tokens, strict=True):
                if handle in self._history:
                    self._history[handle].append(token)

        chunks = []
        first_rows = list(range(len(handles) + 1))
        prompt_rows = []
        pooled_rows = []
        sampling_rows = list(range(len(handles)))
        sampling_positions = (decode_positions + 1).tolist()
        for chunk in plan.chunks:
            self._append_blocks(chunk.handle, chunk.new_blocks)
            begin = len(token_ids)
            token_ids += chunk.token_ids
            end, stop = len(token_ids), chunk.start + len(chunk.token_ids)
            context = self._context_slots(chunk.handle, stop)
            positions.append(np.arange(chunk.start, stop))
            slots.append(context[chunk.start :])
            first_rows.append(end)
            if self._for_gathering:
                earlier = self._tensor(context) if chunk.start else None
                chunks.append(ChunkContext(begin, end, chunk.start, earlier))
            self._num_computed[chunk.handle] = stop
            if chunk.handle in self._history:
                self._history[chunk.handle] += chunk.token_ids
            params = self._params[chunk.handle]
            if params.num_prompt_logprobs >= 0:
                following = [*chunk.token_ids[1:], *([] if chunk.next_token is None else [chunk.next_token])]
                targets = following[: max(0, params.num_prompt_tokens - 1 - chunk.start)]
                prompt_rows.append(PromptRows(chunk.handle, begin, targets, params.num_prompt_logprobs))
            if params.pooling is not None:
                pooled_rows.append(_pooled_rows(chunk, begin, params.pooling))
            if chunk.samples:
                sampling_rows.append(end - 1)
                sampling_positions.append(stop)
        wanted = (
            _wanted_rows(len(token_ids), sampling_rows, prompt_rows, pooled_rows) if plan.chunks else None
        )
        return Batch(
            token_ids=self._tensor(np.array(token_ids, dtype=np.int64)),
            positions=self._tensor(np.concatenate(positions)),
            slots=self._tensor(np.concatenate(slots)),
            decode_groups=groups,
            chunks=chunks,
            sampling_rows=self._tensor(np.array(sampling_rows, dtype=np.int64)),
            sampling_params=[self._params[handle] for handle in plan.sampling_handles],
            sampling_positions=sampling_positions,
            sampling_history=[self._history.get(handle) for handle in plan.sampling_handles],
            prompt_rows=prompt_rows,
            pooled_rows=pooled_rows,
            paged=PagedRows(
                np.array(first_rows, dtype=np.int64),
                np.concatenate((handles, [chunk.handle for chunk in plan.chunks])).astype(np.int64),
                self._blocks,
            ),
            wanted_rows=None if wanted is None else self._tensor(wanted),
        )

    def _decode_groups(self, handles: np.ndarray, lengths: np.ndarray) -> list[DecodeGroup]:
        """Rows sorted by length, cut wherever padding to the longest would more than double the work."""
        if not len(handles):
            return []
        order = np.argsort(lengths, kind="stable")
        cuts = [0]
        for index in range(1, len(order)):
            if lengths[order[index]] > 2 * lengths[order[cuts[-1]]] + 64:
                cuts.append(index)
        cuts.append(len(order))
        groups = []
        for first, last in pairwise(cuts):
            rows = np.sort(order[first:last])
            group_lengths = lengths[rows]
            longest = int(group_lengths.max())
            num_blocks = -(-longest // self._block_size)
            blocks = self._blocks[handles[rows], :num_blocks]
            slots = (blocks[:, :, None] * self._block_size + self._offsets).reshape(len(rows), -1)[
                :, :longest
            ]
            mask = np.arange(longest) < group_lengths[:, None]
            # Padding reads slot 0, which exists and is masked out.
            slots = np.where(mask, slots, 0)
            groups.append(
                DecodeGroup(
                    rows=slice(0, len(rows)) if len(rows) == len(handles) else self._tensor(rows),
                    slots=self._tensor(slots.reshape(-1)),
                    mask=self._tensor(mask).view(len(rows), 1, 1, longest),
                )
            )
        return groups

    def _context_slots(self, handle: int, length: int) -> np.ndarray:
        num_blocks = -(-length // self._block_size)
        blocks = self._blocks[handle, :num_blocks]
        return (blocks[:, None] * self._block_size + self._offsets).reshape(-1)[:length]

    def _append_blocks(self, handle: int, blocks: list[int]) -> None:
        held = self._num_blocks[handle]
        self._blocks[handle, held : held + len(blocks)] = blocks
        self._num_blocks[handle] = held + len(blocks)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)


def _wanted_rows(
    num_tokens: int, sampling: list[int], prompts: list[PromptRows], pooled: list[PooledRows]
) -> np.ndarray | None:
    """As `Batch.wanted_rows`."""
    is_wanted = np.zeros(num_tokens, dtype=bool)
    is_wanted[sampling] = True
    for prompt in prompts:
        is_wanted[prompt.begin : prompt.begin + len(prompt.targets)] = True
    for rows in pooled:
        if rows.pooling.kind is PoolingKind.SCORE:
            is_wanted[rows.score_begin : rows.score_begin + len(rows.targets)] = True
        else:
            is_wanted[rows.begin if rows.pooling.kind is PoolingKind.MEAN else rows.end - 1 : rows.end] = True
    found = np.flatnonzero(is_wanted)
    return found if num_tokens - len(found) >= LEAST_UNWANTED_ROWS else None


def _pooled_rows(chunk: Chunk, begin: int, pooling: Pooling) -> PooledRows:
    """The rows of a chunk that begins at row `begin` of the batch."""
    end = begin + len(chunk.token_ids)
    score_begin, targets = begin, []
    if pooling.kind is PoolingKind.SCORE:
        # A row predicts the token after it: the one before the first scored token is the first to look at.
        skipped = min(len(chunk.token_ids), max(0, pooling.first_scored - 1 - chunk.start))
        following = [] if chunk.next_token is None else [chunk.next_token]
        score_begin, targets = begin + skipped, [*chunk.token_ids[1:], *following][skipped:]
    return PooledRows(chunk.handle, begin, end, pooling, chunk.pools, score_begin, targets)
