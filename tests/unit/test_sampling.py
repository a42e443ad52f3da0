"""Sampling against transformers' processors and against the distribution that it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.execution.sampling import _keep_top_k, _keep_top_p, sample
from engine.plan import SequenceParams


def params(temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0) -> SequenceParams:
    return SequenceParams(temperature, top_p, top_k, seed, 0)


def test_greedy_takes_the_largest() -> None:
    logits = torch.randn(5, 100)
    assert sample(logits.clone(), [params(0.0)] * 5, [0] * 5) == logits.argmax(dim=1).tolist()


@pytest.mark.parametrize("top_k", [1, 3, 50, 1000])
def test_top_k_keeps_what_transformers_keeps(top_k: int) -> None:
    from transformers import TopKLogitsWarper

    logits = torch.randn(4, 200)
    expected = TopKLogitsWarper(top_k)(None, logits.clone())
    _keep_top_k(logits, [top_k] * 4)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(top_p: float) -> None:
    from transformers import TopPLogitsWarper

    logits = torch.randn(4, 200) * 3
    expected = torch.isfinite(TopPLogitsWarper(top_p)(None, logits.clone()))
    probabilities = torch.softmax(logits, dim=-1)
    _keep_top_p(probabilities, [top_p] * 4)
    assert torch.equal(probabilities > 0, expected)


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.2, 0.2, 0.1])
    logits = probabilities.log().repeat(4000, 1)
    drawn = sample(logits, [params(seed=11)] * 4000, list(range(4000)))
    observed = np.bincount(drawn, minlength=4) / 4000
    # Five standard deviations of a binomial share.
    assert np.all(np.abs(observed - probabilities.numpy()) < 5 * np.sqrt(probabilities.numpy() / 4000))


def test_a_token_depends_on_its_own_row_alone() -> None:
    logits = torch.randn(16, 500)
    every = [params(0.8, 0.9, 0, seed) for seed in range(16)]
    positions = list(range(40, 56))
    together = sample(logits.clone(), every, positions)
    for row in range(16):
        mixed = torch.stack([torch.randn(500), logits[row]])
        assert sample(mixed, [params(0.0), every[row]], [3, positions[row]])[1] == together[row]


def test_noise_is_the_same_on_every_machine() -> None:
    # Philox4x64-10 is a published algorithm; these values must never change, or replays would.
    flat = torch.zeros(3, 2**16)
    assert sample(flat, [params(seed=1), params(seed=-1), params(seed=2**63 - 1)], [0, 7, 4096]) == [
        19894,
        44994,
        5937,
    ]


def test_tiny_probability_tail_and_last_token_stay_in_range() -> None:
    logits = torch.full((64, 10), -1e30)
    logits[:, 9] = 0.0
    assert sample(logits, [params(seed=s) for s in range(64)], [1] * 64) == [9] * 64
