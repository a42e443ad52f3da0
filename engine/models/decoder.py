"""The decoder of the Llama family, for the layers and the shard that one rank holds.

It reads like the architecture: embedding, layers of attention and MLP, norm, head. How the weights were cut is
data (`sharding.RankShape`); the sums over the other shards come from the group that it is given.

The residual stream is float32 whatever the model's type: partial sums arrive in float32, and adding them up in
bfloat16 would throw away what the reduction kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.collectives.base import TensorGroup
from engine.execution.batch import Batch
from engine.execution.kv_cache import KVCache
from engine.models.attention import HeadGroups, paged_attention
from engine.models.config import ModelConfig
from engine.models.rotary import rotary_tables
from engine.models.sharding import RankShape

Weights = dict[str, torch.Tensor]


class DecoderStage:
    """The layers of one pipeline stage, as cut for one tensor-parallel rank."""

    def __init__(
        self, config: ModelConfig, shape: RankShape, weights: Weights, group: TensorGroup, max_positions: int
    ) -> None:
        any_weight = next(iter(weights.values()))
        self.dtype, self.device = any_weight.dtype, any_weight.device
        self._shape = shape
        self._group = group
        self._embedding = weights["embed.weight"] if shape.has_embedding else None
        heads = HeadGroups(shape.q_to_kv, self.device)
        self._layers = [DecoderLayer(i, config, shape, weights, group, heads) for i in shape.layers]
        self._head = weights["head.weight"] if shape.has_head else None
        self._norm = weights["norm.weight"].float() if shape.has_head else None
        self._eps = config.rms_norm_eps
        cos, sin = (table.to(self.device) for table in rotary_tables(config, max_positions))
        # Both halves of a head turn by the same angles: [num_positions, 1, head_dim].
        self._cos = torch.cat((cos, cos), dim=-1).unsqueeze(1)
        self._sin = torch.cat((-sin, sin), dim=-1).unsqueeze(1)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`[num_tokens]` to `[num_tokens, hidden_size]` float32. Each rank looks up the part of the vocabulary
        that it holds."""
        assert self._embedding is not None
        if self._group.size == 1:
            return F.embedding(token_ids, self._embedding).float()
        vocab = self._shape.vocab
        local = token_ids - vocab.start
        elsewhere = (local < 0) | (local >= len(vocab))
        mine = F.embedding(local.masked_fill(elsewhere, 0), self._embedding).float()
        mine.masked_fill_(elsewhere.unsqueeze(1), 0.0)
        hidden = torch.zeros_like(mine)
        self._group.add_reduced(hidden, mine)
        return hidden

    def layers(self, hidden: torch.Tensor, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Runs the stage's layers over `hidden` `[num_tokens, hidden_size]` float32, in place."""
        cos, sin = self._cos[batch.positions], self._sin[batch.positions]
        for layer in self._layers:
            layer.attend(hidden, batch, cache, cos, sin)
            layer.transform(hidden)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's columns of the logits: `[num_rows, hidden_size]` to `[num_rows, len(vocab)]` float32."""
        assert self._head is not None and self._norm is not None
        normed = F.rms_norm(hidden, self._norm.shape, self._norm, self._eps)
        return F.linear(normed.to(self.dtype), self._head).float()


class DecoderLayer:
    """Attention and MLP of one layer, this rank's heads and columns of them."""

    def __init__(
        self,
        index: int,
        config: ModelConfig,
        shape: RankShape,
        weights: Weights,
        group: TensorGroup,
        heads: HeadGroups,
    ) -> None:
        def part(name: str) -> torch.Tensor | None:
            return weights.get(f"layers.{index}.{name}")

        self._index = index
        self._group = group
        self._heads = heads
        self._head_dim = config.head_dim
        self._num_heads, self._num_kv_heads = len(shape.q_heads), len(shape.kv_heads)
        self._eps = config.rms_norm_eps
        self._attention_norm = weights[f"layers.{index}.attention_norm.weight"].float()
        self._qkv, self._qkv_bias = weights[f"layers.{index}.qkv.weight"], part("qkv.bias")
        self._output, self._output_bias = weights[f"layers.{index}.output.weight"], part("output.bias")
        self._mlp_norm = weights[f"layers.{index}.mlp_norm.weight"].float()
        self._gate_up, self._gate_up_bias = weights[f"layers.{index}.gate_up.weight"], part("gate_up.bias")
        self._down, self._down_bias = weights[f"layers.{index}.down.weight"], part("down.bias")
        self._dtype = self._qkv.dtype

    def attend(
        self, hidden: torch.Tensor, batch: Batch, cache: KVCache, cos: torch.Tensor, sin: torch.Tensor
    ) -> None:
        """`hidden += attention(norm(hidden))`."""
        normed = F.rms_norm(hidden, self._attention_norm.shape, self._attention_norm, self._eps)
        qkv = F.linear(normed.to(self._dtype), self._qkv, self._qkv_bias)
        qkv = qkv.view(-1, self._num_heads + 2 * self._num_kv_heads, self._head_dim)
        num_turned = self._num_heads + self._num_kv_heads
        turned = _rotate(qkv[:, :num_turned], cos, sin)
        attended = paged_attention(
            turned[:, : self._num_heads],
            turned[:, self._num_heads :],
            qkv[:, num_turned:],
            cache.keys[self._index],
            cache.values[self._index],
            self._heads,
            batch,
        )
        attended = attended.reshape(hidden.shape[0], -1)
        self._group.add_reduced(hidden, F.linear(attended, self._output, self._output_bias))

    def transform(self, hidden: torch.Tensor) -> None:
        """`hidden += mlp(norm(hidden))`, the gated MLP of Llama (SwiGLU, arXiv 2002.05202)."""
        normed = F.rms_norm(hidden, self._mlp_norm.shape, self._mlp_norm, self._eps)
        gate, up = F.linear(normed.to(self._dtype), self._gate_up, self._gate_up_bias).chunk(2, dim=-1)
        activated = F.silu(gate).mul_(up)
        self._group.add_reduced(hidden, F.linear(activated, self._down, self._down_bias))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (RoFormer, arXiv 2104.09864) in the half-split layout of Hugging Face checkpoints.

    x `[num_tokens, num_heads, head_dim]`; cos, sin `[num_tokens, 1, head_dim]` float32, sin negated in its first
    half. Computed in float32, returned in the type of x.
    """
    wide = x.float()
    swapped = torch.roll(wide, x.shape[-1] // 2, dims=-1)
    return torch.addcmul(wide * cos, swapped, sin).to(x.dtype)
