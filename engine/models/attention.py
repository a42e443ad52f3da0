"""Attention over the paged KV cache, with any map from query heads to KV heads.

Called by the decoder, once a layer. It is given shapes and never asks which rank it is on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from engine.execution.batch import Batch, ChunkContext, DecodeGroup

_MAX_CAPPED_SCORES = 2**23
"""Scores (float32) that attention with a soft cap holds at a time: a whole chunk's would be gigabytes."""


@dataclass(frozen=True)
class Scoring:
    """What becomes of the products of queries and keys before the softmax."""

    scale: float
    """They are multiplied with it."""
    soft_cap: float | None = None
    """Then they become cap * tanh(score / cap)."""


class HeadGroups:
    """Query heads gathered under their KV head, padded to the largest group.

    A rank's range of query heads may cut a group, so groups differ in size: 9 query and 3 KV heads over two
    ranks are groups of 3 and 2 on the first, 1 and 3 on the second.
    """

    def __init__(self, q_to_kv: tuple[int, ...], device: torch.device) -> None:
        self.num_heads = len(q_to_kv)
        self.num_kv_heads = max(q_to_kv) + 1
        members = [[q for q, kv in enumerate(q_to_kv) if kv == group] for group in range(self.num_kv_heads)]
        self.group_size = max(len(heads) for heads in members)
        self.is_even = all(len(heads) == self.group_size for heads in members)
        # A short group repeats its last head; the repeated rows are computed and dropped.
        padded = [heads + [heads[-1]] * (self.group_size - len(heads)) for heads in members]
        place = {
            head: g * self.group_size + i for g, heads in enumerate(members) for i, head in enumerate(heads)
        }
        self._gather = torch.tensor([head for heads in padded for head in heads], device=device)
        self._scatter = torch.tensor([place[head] for head in range(self.num_heads)], device=device)
        self.kv_of_head = torch.tensor(q_to_kv, device=device)

    def group(self, q: torch.Tensor) -> torch.Tensor:
        """`[n, num_heads, head_dim]` to `[n, num_kv_heads, group_size, head_dim]`."""
        if not self.is_even:
            q = q.index_select(1, self._gather)
        return q.reshape(q.shape[0], self.num_kv_heads, self.group_size, q.shape[2])

    def ungroup(self, out: torch.Tensor) -> torch.Tensor:
        """The inverse of `group`."""
        out = out.reshape(out.shape[0], -1, out.shape[3])
        return out if self.is_even else out.index_select(1, self._scatter)


def within_window(batch: Batch, window: int | None) -> Batch:
    """The batch as layers see it in which a token looks at itself and `window - 1` before it (None: at all).

    Made once a step for each window: it holds the masks that the layers share. Tokens out of sight are not
    read from the cache.
    """
    if window is None and not batch.chunks:
        return batch
    groups = batch.decode_groups
    if window is not None:
        groups = [_last_tokens(group, window) for group in groups]
    return replace(
        batch, decode_groups=groups, chunks=[_visible_tokens(chunk, window) for chunk in batch.chunks]
    )


def _last_tokens(group: DecodeGroup, window: int) -> DecodeGroup:
    num_rows, longest = group.mask.shape[0], group.mask.shape[-1]
    if longest <= window:
        return group
    lengths = group.mask.view(num_rows, longest).sum(dim=1, keepdim=True)
    # Contexts shorter than the window are padded in front, with their own first token.
    index = lengths - window + torch.arange(window, device=group.mask.device)
    slots = group.slots.view(num_rows, longest).gather(1, index.clamp_min(0))
    return DecodeGroup(group.rows, slots.view(-1), (index >= 0).view(num_rows, 1, 1, window))


def _visible_tokens(chunk: ChunkContext, window: int | None) -> ChunkContext:
    num_rows = chunk.end - chunk.begin
    stop = chunk.start + num_rows
    if chunk.slots is None and (window is None or stop <= window):
        return chunk
    first = 0 if window is None else max(0, chunk.start - window + 1)
    slots = None if chunk.slots is None else chunk.slots[first:]
    device = None if slots is None else slots.device
    # Row i stands at chunk.start + i, key j at first + j.
    ahead = chunk.start - first
    mask = torch.ones(num_rows, stop - first, dtype=torch.bool, device=device).tril_(ahead)
    if window is not None:
        mask.triu_(ahead - window + 1)
    return replace(chunk, slots=slots, mask=mask)


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    heads: HeadGroups,
    scoring: Scoring,
    batch: Batch,
) -> torch.Tensor:
    """Writes the new keys and values into the cache and attends.

    q `[num_tokens, num_heads, head_dim]`; k, v `[num_tokens, num_kv_heads, head_dim]`; caches
    `[num_slots, num_kv_heads, head_dim]`; `batch` as `within_window` made it. Returns
    `[num_tokens, num_heads, head_dim]`.
    """
    k_cache.index_copy_(0, batch.slots, k)
    v_cache.index_copy_(0, batch.slots, v)
    if len(batch.decode_groups) == 1 and not batch.chunks:
        return _decode(q, k_cache, v_cache, heads, scoring, batch.decode_groups[0])
    out = torch.empty_like(q)
    for group in batch.decode_groups:
        out[group.rows] = _decode(q[group.rows], k_cache, v_cache, heads, scoring, group)
    for chunk in batch.chunks:
        rows = slice(chunk.begin, chunk.end)
        if chunk.slots is None:
            out[rows] = _attend_chunk(q[rows], k[rows], v[rows], heads, scoring, chunk.mask)
        else:
            keys, values = k_cache.index_select(0, chunk.slots), v_cache.index_select(0, chunk.slots)
            out[rows] = _attend_chunk(q[rows], keys, values, heads, scoring, chunk.mask)
    return out


def _decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    heads: HeadGroups,
    scoring: Scoring,
    group: DecodeGroup,
) -> torch.Tensor:
    """One new token for each sequence. The heads of a group are the query rows of one attention, so that keys
    and values are read once and never repeated."""
    num_rows, context = q.shape[0], group.mask.shape[-1]
    shape = (num_rows, context, heads.num_kv_heads, q.shape[2])
    keys = k_cache.index_select(0, group.slots).view(shape).transpose(1, 2)
    values = v_cache.index_select(0, group.slots).view(shape).transpose(1, 2)
    return heads.ungroup(_attend(heads.group(q), keys, values, scoring, group.mask))


def _attend_chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: HeadGroups,
    scoring: Scoring,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """A chunk of one sequence; k, v are those of all tokens that one of its rows sees. No mask: causal."""
    if heads.num_heads != heads.num_kv_heads:
        k, v = k.index_select(1, heads.kv_of_head), v.index_select(1, heads.kv_of_head)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return _attend(q, k, v, scoring, mask)[0].transpose(0, 1)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring, mask: torch.Tensor | None
) -> torch.Tensor:
    """q `[batch, heads, num_rows, head_dim]`, k and v `[batch, heads, num_keys, head_dim]`; no mask: causal."""
    if scoring.soft_cap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scoring.scale
        )
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril_()
    step = max(1, _MAX_CAPPED_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    parts = []
    for begin in range(0, q.shape[2], step):
        rows = slice(begin, begin + step)
        scores = torch.matmul(q[:, :, rows], k.transpose(2, 3)).float()
        scores.mul_(scoring.scale / scoring.soft_cap).tanh_().mul_(scoring.soft_cap)
        hidden = ~(mask if mask.shape[-2] == 1 else mask[rows])
        weights = scores.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
        parts.append(torch.matmul(weights.to(v.dtype), v))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
