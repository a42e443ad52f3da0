"""Mixtures of experts: routed as the plain formula says, and only where tokens were sent."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.models.config import Activation, ExpertConfig
from engine.models.mlp import ExpertMlp

HIDDEN, COLUMNS, COUNT = 16, 12, 5


@pytest.mark.parametrize("num_tokens", [1, 7, 40])
@pytest.mark.parametrize("normalized", [True, False])
def test_experts_against_the_plain_formula(num_tokens: int, normalized: bool) -> None:
    torch.manual_seed(0)
    router = torch.randn(COUNT, HIDDEN)
    gate_up = torch.randn(COUNT, 2 * COLUMNS, HIDDEN)
    down = torch.randn(COUNT, HIDDEN, COLUMNS)
    x = torch.randn(num_tokens, HIDDEN)
    experts = ExpertConfig(COUNT, 2, normalized, "mlp", ("gate", "up", "down"))
    mlp = ExpertMlp(router, gate_up.flatten(0, 1), down.flatten(0, 1), experts, Activation.SILU, range(COUNT))
    found = mlp(x)
    for row in range(num_tokens):
        shares = (router @ x[row]).softmax(0)
        chosen = shares.argsort(descending=True)[:2].tolist()
        total = shares[chosen].sum() if normalized else 1.0
        expected = torch.zeros(HIDDEN)
        for expert in chosen:
            gate, up = (gate_up[expert] @ x[row]).chunk(2)
            expected += shares[expert] / total * (down[expert] @ (F.silu(gate) * up))
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)


def test_an_expert_without_tokens_is_not_read() -> None:
    torch.manual_seed(0)
    router = torch.randn(COUNT, HIDDEN)
    gate_up = torch.randn(COUNT, 2 * COLUMNS, HIDDEN)
    down = torch.randn(COUNT, HIDDEN, COLUMNS)
    x = torch.randn(1, HIDDEN)
    unused = int((router @ x[0]).argmin())
    gate_up[unused] = torch.nan
    down[unused] = torch.nan
    experts = ExpertConfig(COUNT, 2, True, "mlp", ("gate", "up", "down"))
    mlp = ExpertMlp(router, gate_up.flatten(0, 1), down.flatten(0, 1), experts, Activation.SILU, range(COUNT))
    assert mlp(x).isfinite().all()


def test_whole_experts_on_ranks_add_up() -> None:
    """Also where no token is sent to any expert of a rank."""
    torch.manual_seed(0)
    router = torch.randn(COUNT, HIDDEN)
    gate_up = torch.randn(COUNT, 2 * COLUMNS, HIDDEN)
    down = torch.randn(COUNT, HIDDEN, COLUMNS)
    experts = ExpertConfig(COUNT, 2, True, "mlp", ("gate", "up", "down"))

    def part(held: range) -> ExpertMlp:
        mine = slice(held.start, held.stop)
        return ExpertMlp(
            router, gate_up[mine].flatten(0, 1), down[mine].flatten(0, 1), experts, Activation.SILU, held
        )

    for num_tokens in (1, 30):
        x = torch.randn(num_tokens, HIDDEN)
        parts = [part(held)(x) for held in (range(1), range(1, 4), range(4, 5))]
        torch.testing.assert_close(sum(parts), part(range(COUNT))(x), atol=1e-4, rtol=1e-4)
        if num_tokens == 1:
            assert any(not partial.any() for partial in parts), "one of the three has nothing to do"
