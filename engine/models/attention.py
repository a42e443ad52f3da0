"""Attention over the paged KV cache, with any map from query heads to KV heads.

Called by the decoder, once a layer. It is given shapes and never asks which rank it is on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.execution.batch import Batch


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


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    heads: HeadGroups,
    batch: Batch,
) -> torch.Tensor:
    """Writes the new keys and values into the cache and attends.

    q `[num_tokens, num_heads, head_dim]`; k, v `[num_tokens, num_kv_heads, head_dim]`; caches
    `[num_slots, num_kv_heads, head_dim]`. Returns `[num_tokens, num_heads, head_dim]`.
    """
    k_cache.index_copy_(0, batch.slots, k)
    v_cache.index_copy_(0, batch.slots, v)
    if len(batch.decode_groups) == 1 and not batch.chunks:
        group = batch.decode_groups[0]
        return _decode(q, k_cache, v_cache, heads, group.slots, group.mask)
    out = torch.empty_like(q)
    for group in batch.decode_groups:
        out[group.rows] = _decode(q[group.rows], k_cache, v_cache, heads, group.slots, group.mask)
    for chunk in batch.chunks:
        rows = slice(chunk.begin, chunk.end)
        if chunk.slots is None:
            out[rows] = _causal(q[rows], k[rows], v[rows], heads, 0)
        else:
            keys, values = k_cache.index_select(0, chunk.slots), v_cache.index_select(0, chunk.slots)
            out[rows] = _causal(q[rows], keys, values, heads, chunk.start)
    return out


def _decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    heads: HeadGroups,
    slots: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """One new token for each sequence. The heads of a group are the query rows of one attention, so that keys
    and values are read once and never repeated."""
    num_rows, context = q.shape[0], mask.shape[-1]
    shape = (num_rows, context, heads.num_kv_heads, q.shape[2])
    keys = k_cache.index_select(0, slots).view(shape).transpose(1, 2)
    values = v_cache.index_select(0, slots).view(shape).transpose(1, 2)
    attended = F.scaled_dot_product_attention(heads.group(q), keys, values, attn_mask=mask)
    return heads.ungroup(attended)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: HeadGroups, start: int) -> torch.Tensor:
    """A chunk of one sequence whose first row stands at position `start`; k, v are those of the whole context."""
    if heads.num_heads != heads.num_kv_heads:
        k, v = k.index_select(1, heads.kv_of_head), v.index_select(1, heads.kv_of_head)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    if start == 0:
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(diagonal=start)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attended[0].transpose(0, 1)
