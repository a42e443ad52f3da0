"""The MLPs of a layer: one for all tokens, or a mixture of experts. This rank's columns of them.

Called by the decoder with normalised hidden states; what comes out is this rank's part of the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from engine.models.config import Activation, ExpertConfig

Activate = Callable[[torch.Tensor], torch.Tensor]

ACTIVATIONS: dict[Activation, Activate] = {
    Activation.SILU: F.silu,
    Activation.GELU_TANH: partial(F.gelu, approximate="tanh"),
}


class GatedMlp:
    """`down(activate(gate(x)) * up(x))` (GLU variants, arXiv 2002.05202)."""

    def __init__(
        self,
        gate_up: torch.Tensor,
        gate_up_bias: torch.Tensor | None,
        down: torch.Tensor,
        down_bias: torch.Tensor | None,
        activation: Activation,
    ) -> None:
        self._gate_up, self._gate_up_bias = gate_up, gate_up_bias
        self._down, self._down_bias = down, down_bias
        self._activate = ACTIVATIONS[activation]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, hidden_size]` to the same, both in the model's type."""
        gate, up = F.linear(x, self._gate_up, self._gate_up_bias).chunk(2, dim=-1)
        return F.linear(self._activate(gate).mul_(up), self._down, self._down_bias)


class ExpertMlp:
    """A mixture of experts: the router sends each token to a few of them, and adds up what they say.

    Every rank holds the whole router, so that all ranks route alike, and some columns of every expert or some experts
    whole. The work grows with the routed tokens: those of an expert are computed together, and one that no token was
    sent to is not read.
    """

    def __init__(
        self,
        router: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        experts: ExpertConfig,
        activation: Activation,
        held: range,
    ) -> None:
        """`held`: the experts whose parts `gate_up` and `down` are."""
        self._router = router
        self._held = held
        self._gate_ups = gate_up.chunk(len(held))
        self._downs = down.chunk(len(held))
        self._experts = experts
        self._activate = ACTIVATIONS[activation]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, hidden_size]` in the model's type to the same in float32."""
        per_token = self._experts.per_token
        shares = F.linear(x, self._router).float().softmax(dim=-1)
        weights, chosen = shares.topk(per_token, dim=-1)
        if self._experts.normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        # Routes in the order of their experts; those of a token are `per_token` apart in the flat list.
        order = chosen.view(-1).argsort(stable=True)
        counts = chosen.view(-1).bincount(minlength=self._experts.count).tolist()
        first = sum(counts[: self._held.start])
        counts = counts[self._held.start : self._held.stop]
        order = order[first : first + sum(counts)]
        tokens = order // per_token
        parts = []
        for rows, gate_up, down in zip(x[tokens].split(counts), self._gate_ups, self._downs, strict=True):
            if len(rows):
                gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
                parts.append(F.linear(self._activate(gate).mul_(up), down))
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        if not parts:
            return out
        routed = torch.cat(parts).float().mul_(weights.view(-1)[order].unsqueeze(1))
        return out.index_add_(0, tokens, routed)
