"""Root mean square norms (arXiv 1910.07467): of hidden states, and of queries and keys head by head or whole.

Called by the decoder. Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from engine.collectives.base import TensorGroup
from engine.models.config import ModelConfig
from engine.models.families import QueryKeyNorm
from engine.models.sharding import RankShape

HeadNorm = Callable[[torch.Tensor], torch.Tensor]
"""Queries and keys side by side, `[num_tokens, num_heads + num_kv_heads, head_dim]`, to the same in float32."""


class Norm:
    """Over the last dimension."""

    def __init__(self, weight: torch.Tensor, config: ModelConfig) -> None:
        self._weight = weight.float() + config.norm_offset if config.norm_offset else weight.float()
        self._eps = config.rms_norm_eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self._weight.shape, self._weight, self._eps)


def head_norm(
    config: ModelConfig,
    shape: RankShape,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    group: TensorGroup,
) -> HeadNorm | None:
    """The norm of queries and keys that the model has, for this rank's heads; None: it has none."""
    if q_weight is None or k_weight is None:
        return None
    if config.query_key_norm is QueryKeyNorm.HEAD:
        return PerHeadNorm(config, shape, q_weight, k_weight)
    return ProjectionNorm(config, shape, q_weight, k_weight, group)


class PerHeadNorm:
    """Each head on its own, with weights `[head_dim]` for all queries and for all keys."""

    def __init__(
        self, config: ModelConfig, shape: RankShape, q_weight: torch.Tensor, k_weight: torch.Tensor
    ) -> None:
        counts = torch.tensor([shape.num_q_heads, shape.num_kv_heads], device=q_weight.device)
        both = torch.stack((q_weight, k_weight)).float() + config.norm_offset
        self._weight = both.repeat_interleave(counts, dim=0)
        self._eps = config.rms_norm_eps

    def __call__(self, heads: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(heads.float(), heads.shape[-1:], None, self._eps).mul_(self._weight)


class ProjectionNorm:
    """All query heads of a token together, and all KV heads: the mean squares are taken over the ranks.

    Weights are this rank's part, `[num_heads * head_dim]`.
    """

    def __init__(
        self,
        config: ModelConfig,
        shape: RankShape,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        group: TensorGroup,
    ) -> None:
        num_heads, num_kv_heads = shape.num_q_heads, shape.num_kv_heads
        weight = torch.cat((q_weight, k_weight)).float() + config.norm_offset
        self._weight = weight.view(num_heads + num_kv_heads, config.head_dim)
        self._eps = config.rms_norm_eps
        self._group = group
        # Which of the two norms a head belongs to, [heads, 2]; and what it adds to the mean square, where a
        # KV head that several ranks hold adds something on one of them only.
        self._membership = torch.zeros(num_heads + num_kv_heads, 2, device=weight.device)
        self._membership[:num_heads, 0] = 1.0
        self._membership[num_heads:, 1] = 1.0
        self._shares = self._membership.clone()
        self._shares[:, 0] /= config.num_heads * config.head_dim
        self._shares[:, 1] /= config.num_kv_heads * config.head_dim
        for local, kv_head in enumerate(shape.kv_heads):
            if kv_head not in shape.counted_kv_heads:
                self._shares[num_heads + local] = 0.0

    def __call__(self, heads: torch.Tensor) -> torch.Tensor:
        wide = heads.float()
        mean_squares = self._group.reduced(wide.square().sum(dim=-1) @ self._shares)
        scale = torch.rsqrt(mean_squares + self._eps) @ self._membership.t()
        return wide * scale.unsqueeze(-1) * self._weight
