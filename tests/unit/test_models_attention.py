"""Paged attention against the plain formula, row by row: windows, soft caps, uneven groups of heads."""

from __future__ import annotations

import pytest
import torch

from engine.execution.batch import Batch, SequenceTable
from engine.models import attention
from engine.models.attention import HeadGroups, Scoring, paged_attention, within_window
from engine.plan import Chunk, SequenceParams, StepPlan

BLOCK_SIZE = 4
HEAD_DIM = 8
Q_TO_KV = (0, 0, 0, 1, 1)


class _Sequences:
    """Sequences in a table and a cache, with all their keys and values kept beside it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.table = SequenceTable(8, 64, BLOCK_SIZE, torch.device("cpu"))
        self.k_cache = torch.zeros(64 * BLOCK_SIZE, 2, HEAD_DIM)
        self.v_cache = torch.zeros_like(self.k_cache)
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self._next_block = 60

    def chunk(self, handle: int, start: int, length: int) -> Chunk:
        held = -(-start // BLOCK_SIZE)
        num_new = -(-(start + length) // BLOCK_SIZE) - held
        self._next_block -= num_new
        # Blocks in falling order, so that slots and positions are different things.
        blocks = list(range(self._next_block + num_new, self._next_block, -1))
        return Chunk(handle, start, [7] * length, blocks, None)

    def run(
        self, plan: StepPlan, lengths: list[tuple[int, int]], window: int | None, scoring: Scoring
    ) -> None:
        """One step; `lengths` are (handle, rows) in the order of the batch. Checks every row."""
        batch: Batch = self.table.apply(plan)
        num_tokens = batch.num_tokens
        q = torch.randn(num_tokens, len(Q_TO_KV), HEAD_DIM)
        k, v = torch.randn(num_tokens, 2, HEAD_DIM), torch.randn(num_tokens, 2, HEAD_DIM)
        heads = HeadGroups(Q_TO_KV, torch.device("cpu"))
        found = paged_attention(
            q, k, v, self.k_cache, self.v_cache, heads, scoring, within_window(batch, window)
        )
        begin = 0
        for handle, rows in lengths:
            end = begin + rows
            empty = torch.empty(0, 2, HEAD_DIM)
            self.keys[handle] = torch.cat((self.keys.get(handle, empty), k[begin:end]))
            self.values[handle] = torch.cat((self.values.get(handle, empty), v[begin:end]))
            for row in range(begin, end):
                stop = len(self.keys[handle]) - (end - 1 - row)
                first = 0 if window is None else max(0, stop - window)
                keys, values = self.keys[handle][first:stop], self.values[handle][first:stop]
                for head, kv_head in enumerate(Q_TO_KV):
                    scores = keys[:, kv_head] @ q[row, head] * scoring.scale
                    if scoring.soft_cap is not None:
                        scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
                    expected = scores.softmax(0) @ values[:, kv_head]
                    torch.testing.assert_close(found[row, head], expected, atol=1e-5, rtol=1e-5)
            begin = end


def _admitted(*handles: int) -> list[tuple[int, SequenceParams]]:
    return [(handle, SequenceParams(0.0, 1.0, 0, 0, 0)) for handle in handles]


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 5, 16, 100])
def test_every_row_sees_what_it_should(
    window: int | None, soft_cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Capped scores come in pieces of a few rows.
    monkeypatch.setattr(attention, "_MAX_CAPPED_SCORES", 200)
    sequences = _Sequences()
    scoring = Scoring(0.5, soft_cap)
    first = [sequences.chunk(0, 0, 13), sequences.chunk(1, 0, 3), sequences.chunk(2, 0, 20)]
    sequences.run(
        StepPlan(step=1, slot=0, admitted=_admitted(0, 1, 2), chunks=first),
        [(0, 13), (1, 3), (2, 20)],
        window,
        scoring,
    )
    # Decode rows beside the second chunk of a prompt.
    decode = StepPlan(
        step=2,
        slot=0,
        decode_handles=[1, 0],
        decode_tokens=[5, 5],
        chunks=[sequences.chunk(2, 20, 11)],
    )
    sequences.run(decode, [(1, 1), (0, 1), (2, 11)], window, scoring)
    # Decode rows alone, of very different lengths.
    alone = StepPlan(
        step=3,
        slot=0,
        decode_handles=[0, 1, 2],
        decode_tokens=[5, 5, 5],
        decode_blocks=[(1, 62)],
    )
    sequences.run(alone, [(0, 1), (1, 1), (2, 1)], window, scoring)


def test_a_window_reads_no_more_of_the_cache_than_it_needs() -> None:
    sequences = _Sequences()
    plan = StepPlan(step=1, slot=0, admitted=_admitted(0), chunks=[sequences.chunk(0, 0, 20)])
    assert within_window(sequences.table.apply(plan), 64).chunks[0].mask is None, "plainly causal"
    later = sequences.table.apply(StepPlan(step=2, slot=0, chunks=[sequences.chunk(0, 20, 4)]))
    (chunk,) = within_window(later, 6).chunks
    assert chunk.slots is not None
    assert chunk.mask is not None
    assert chunk.slots.shape == (5 + 4,)
    assert chunk.mask.shape == (4, 9)
    assert chunk.mask.sum(dim=1).tolist() == [6, 6, 6, 6]
    decode = sequences.table.apply(
        StepPlan(step=3, slot=0, decode_handles=[0], decode_tokens=[5], decode_blocks=[(0, 3)])
    )
    (group,) = within_window(decode, 6).decode_groups
    assert group.slots.shape == (6,)
    assert within_window(decode, None) is decode
