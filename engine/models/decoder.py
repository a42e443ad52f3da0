"""The one decoder of all families, for the layers and the shard that one rank holds.

It reads like the architecture: embedding, layers of attention and MLP, norm, head. What a family does otherwise
is data (`config.ModelConfig`), and so is how the weights were cut (`sharding.RankShape`); the sums over the
other shards come from the group that it is given.

The residual stream is float32 whatever the model's type: partial sums arrive in float32, and adding them up in
bfloat16 would throw away what the reduction kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.collectives.base import TensorGroup
from engine.execution.batch import Batch
from engine.execution.kv_cache import KVCache
from engine.models.attention import HeadGroups, Scoring, paged_attention, within_window
from engine.models.config import ModelConfig
from engine.models.mlp import ExpertMlp, GatedMlp
from engine.models.norms import Norm, head_norm
from engine.models.rope_config import RopeConfig
from engine.models.rotary import rotary_tables
from engine.models.sharding import RankShape

Weights = dict[str, torch.Tensor]

Turns = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of a batch's positions, `[num_tokens, 1, rotary_dim]` each; the sines negated in their
first half."""


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
        # Rounded as the model's own type rounds it: so it was trained.
        multiplier = torch.tensor(config.embedding_multiplier, dtype=self.dtype).item()
        self._embedding_multiplier = multiplier if multiplier != 1.0 else None
        self._head = weights["head.weight"] if shape.has_head else None
        self._norm = Norm(weights["norm.weight"], config) if shape.has_head else None
        self._logit_divisor = config.logit_divisor if config.logit_divisor != 1.0 else None
        self._logit_soft_cap = config.logit_soft_cap

        # Layers differ in what they turn and how far they look in a few ways only, each made once a step.
        ropes = list(dict.fromkeys(rope for i in shape.layers if (rope := config.rope_of(i)) is not None))
        self._rotaries = [Rotary(rope, config.head_dim, max_positions, self.device) for rope in ropes]
        self._windows = list(dict.fromkeys(config.window_of(i) for i in shape.layers))
        heads = HeadGroups(shape.q_to_kv, self.device)
        self._layers = [
            DecoderLayer(i, config, shape, weights, group, heads, ropes, self._windows) for i in shape.layers
        ]

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`[num_tokens]` to `[num_tokens, hidden_size]` float32. Each rank looks up the part of the vocabulary
        that it holds."""
        assert self._embedding is not None
        if self._group.size == 1:
            hidden = F.embedding(token_ids, self._embedding).float()
        else:
            vocab = self._shape.vocab
            local = token_ids - vocab.start
            elsewhere = (local < 0) | (local >= len(vocab))
            mine = F.embedding(local.masked_fill(elsewhere, 0), self._embedding).float()
            mine.masked_fill_(elsewhere.unsqueeze(1), 0.0)
            hidden = self._group.reduced(mine)
        if self._embedding_multiplier is not None:
            hidden.mul_(self._embedding_multiplier)
        return hidden

    def layers(self, hidden: torch.Tensor, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Runs the stage's layers over `hidden` `[num_tokens, hidden_size]` float32, in place."""
        turns = [rotary.turns(batch.positions) for rotary in self._rotaries]
        views = [within_window(batch, window) for window in self._windows]
        for layer in self._layers:
            layer.attend(hidden, views, cache, turns)
            layer.transform(hidden)
        return hidden

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The last stage's hidden states as the head sees them: `[num_rows, hidden_size]` float32, to the same."""
        assert self._norm is not None
        return self._norm(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's columns of the logits: `[num_rows, hidden_size]` to `[num_rows, len(vocab)]` float32."""
        assert self._head is not None and self._norm is not None
        logits = F.linear(self._norm(hidden).to(self.dtype), self._head).float()
        if self._logit_divisor is not None:
            logits.div_(self._logit_divisor)
        if self._logit_soft_cap is not None:
            logits.div_(self._logit_soft_cap).tanh_().mul_(self._logit_soft_cap)
        return logits


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
        ropes: list[RopeConfig],
        windows: list[int | None],
    ) -> None:
        def whole(name: str) -> torch.Tensor:
            return weights[f"layers.{index}.{name}"]

        def part(name: str) -> torch.Tensor | None:
            return weights.get(f"layers.{index}.{name}")

        def norm(name: str) -> Norm | None:
            weight = part(f"{name}.weight")
            return None if weight is None else Norm(weight, config)

        self._index = index
        self._group = group
        self._heads = heads
        self._head_dim = config.head_dim
        self._num_heads, self._num_kv_heads = len(shape.q_heads), len(shape.kv_heads)
        rope = config.rope_of(index)
        self._rope_index = None if rope is None else ropes.index(rope)
        self._window_index = windows.index(config.window_of(index))
        scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self._scoring = Scoring(scale, config.attention_soft_cap)
        self._residual_multiplier = config.residual_multiplier if config.residual_multiplier != 1.0 else None

        self._attention_norm, self._attention_post_norm = norm("attention_norm"), norm("attention_post_norm")
        self._qkv, self._qkv_bias = whole("qkv.weight"), part("qkv.bias")
        self._head_norm = head_norm(config, shape, part("q_norm.weight"), part("k_norm.weight"), group)
        self._output, self._output_bias = whole("output.weight"), part("output.bias")
        self._mlp_norm, self._mlp_post_norm = norm("mlp_norm"), norm("mlp_post_norm")
        self._mlp: GatedMlp | ExpertMlp
        if config.experts is None:
            self._mlp = GatedMlp(
                whole("gate_up.weight"), part("gate_up.bias"), whole("down.weight"), part("down.bias"),
                config.activation,
            )  # fmt: skip
        else:
            self._mlp = ExpertMlp(
                whole("router.weight"), whole("experts_gate_up.weight"), whole("experts_down.weight"),
                config.experts, config.activation, shape.experts,
            )  # fmt: skip
        self._dtype = self._qkv.dtype

    def attend(self, hidden: torch.Tensor, views: list[Batch], cache: KVCache, turns: list[Turns]) -> None:
        """`hidden += attention(norm(hidden))`. `views` and `turns` are the stage's, one for each kind of
        window and of rotary embedding."""
        normed = hidden if self._attention_norm is None else self._attention_norm(hidden)
        qkv = F.linear(normed.to(self._dtype), self._qkv, self._qkv_bias)
        qkv = qkv.view(-1, self._num_heads + 2 * self._num_kv_heads, self._head_dim)
        num_turned = self._num_heads + self._num_kv_heads
        turned = qkv[:, :num_turned]
        if self._head_norm is not None:
            turned = self._head_norm(turned)
        if self._rope_index is not None:
            turned = _rotate(turned, *turns[self._rope_index])
        turned = turned.to(self._dtype)
        attended = paged_attention(
            turned[:, : self._num_heads],
            turned[:, self._num_heads :],
            qkv[:, num_turned:],
            cache.keys[self._index],
            cache.values[self._index],
            self._heads,
            self._scoring,
            views[self._window_index],
        )
        attended = attended.reshape(hidden.shape[0], -1)
        self._add(hidden, F.linear(attended, self._output, self._output_bias), self._attention_post_norm)

    def transform(self, hidden: torch.Tensor) -> None:
        """`hidden += mlp(norm(hidden))`."""
        normed = hidden if self._mlp_norm is None else self._mlp_norm(hidden)
        self._add(hidden, self._mlp(normed.to(self._dtype)), self._mlp_post_norm)

    def _add(self, hidden: torch.Tensor, partial: torch.Tensor, norm: Norm | None) -> None:
        """Adds what the ranks computed to the residual stream, normalised as a whole where the model does so."""
        if self._residual_multiplier is not None:
            partial.mul_(self._residual_multiplier)
        if norm is None:
            self._group.add_reduced(hidden, partial)
        else:
            hidden.add_(norm(self._group.reduced(partial)))


class Rotary:
    """One kind of rotary embedding, as tables over all positions."""

    def __init__(self, rope: RopeConfig, head_dim: int, max_positions: int, device: torch.device) -> None:
        cos, sin = (table.to(device) for table in rotary_tables(rope, head_dim, max_positions))
        # Both halves of a head turn by the same angles: [num_positions, 1, rotary_dim].
        self._cos = torch.cat((cos, cos), dim=-1).unsqueeze(1)
        self._sin = torch.cat((-sin, sin), dim=-1).unsqueeze(1)

    def turns(self, positions: torch.Tensor) -> Turns:
        return self._cos[positions], self._sin[positions]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (RoFormer, arXiv 2104.09864) in the half-split layout of Hugging Face checkpoints.

    x `[num_tokens, num_heads, head_dim]`; cos, sin `[num_tokens, 1, rotary_dim]` float32, sin negated in its
    first half. What a head has beyond rotary_dim is left as it is. Returns float32.
    """
    rotary_dim = cos.shape[-1]
    wide = x.float()
    turned = wide[..., :rotary_dim]
    swapped = torch.roll(turned, rotary_dim // 2, dims=-1)
    turned = torch.addcmul(turned * cos, swapped, sin)
    return turned if rotary_dim == x.shape[-1] else torch.cat((turned, wide[..., rotary_dim:]), dim=-1)
