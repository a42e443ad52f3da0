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


@pytest.mark.parametrize("vocab", [1, 7, 100, 49_152, 100_003])
def test_greedy_takes_the_lowest_of_equals(vocab: int) -> None:
    logits = torch.randn(4, vocab).clamp_(max=0.5)
    ties = [sorted({0, vocab // 3, vocab - 1}), [vocab - 1], [vocab // 2, vocab - 1], list(range(vocab))]
    for row, tokens in enumerate(ties):
        logits[row, tokens] = 3.25
    expected = [tokens[0] for tokens in ties]
    assert sample(logits.clone(), [params(0.0)] * 4, [5] * 4) == expected
    assert sample(logits.bfloat16().float(), [params(0.0)] * 4, [5] * 4) == expected


def test_narrowed_to_one_a_draw_is_greedy_ties_and_all() -> None:
    logits = torch.zeros(1, 50)
    logits[0, [9, 20]] = 4.0
    # Ties with the last one that is kept stay: both are drawn, and no other.
    drawn = {sample(logits.clone(), [params(1.0, top_k=1, seed=seed)], [3])[0] for seed in range(40)}
    assert drawn == {9, 20}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_all_at_once_leaves_the_distribution_of_transformers(temperature: float) -> None:
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    torch.manual_seed(3)
    logits = torch.randn(1, 12) * 2
    processors = LogitsProcessorList(
        [
            TemperatureLogitsWarper(temperature),
            TopKLogitsWarper(8),
            MinPLogitsWarper(0.02),
            TopPLogitsWarper(0.9),
        ]
    )
    expected = torch.softmax(processors(None, logits.clone()), dim=-1)[0].numpy()
    count = 6000
    one = SequenceParams(temperature, 0.9, 8, 7, 0, min_p=0.02)
    drawn = sample(logits.repeat(count, 1), [one] * count, list(range(count)))
    observed = np.bincount(drawn, minlength=12) / count
    assert np.all(observed[expected == 0] == 0)
    assert np.all(np.abs(observed - expected) < 5 * np.sqrt(expected / count) + 1e-9)


def test_rows_are_drawn_alike_alone_and_in_a_batch() -> None:
    logits = torch.randn(13, 49152) * 4
    every = [
        params(temperature=0.3 + 0.1 * row, top_p=1.0 - 0.03 * row, top_k=(0, 40)[row % 2], seed=row)
        for row in range(13)
    ]
    positions = list(range(100, 113))
    batched = sample(logits.clone(), every, positions)
    log_scores = torch.log_softmax(logits, dim=-1)
    for row in range(13):
        assert sample(logits[row : row + 1].clone(), every[row : row + 1], positions[row : row + 1]) == [
            batched[row]
        ]
        assert torch.equal(torch.log_softmax(logits[row : row + 1], dim=-1)[0], log_scores[row])
    probabilities = torch.softmax(logits, dim=-1)
    sums = torch.cumsum(probabilities.double(), dim=-1)
    for rows in (slice(0, 1), slice(3, 5), slice(4, 13)):
        part = torch.softmax(logits[rows].clone(), dim=-1)
        assert torch.equal(part, probabilities[rows])
        assert torch.equal(torch.cumsum(part.double(), dim=-1), sums[rows])
