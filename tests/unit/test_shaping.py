"""Penalties, bias, minimum length and bad words against transformers' processors, and log-probabilities."""

from __future__ import annotations

import pytest
import torch

from engine.execution.logprobs import token_logprobs
from engine.execution.sampling import _keep_min_p
from engine.execution.shaping import shape
from engine.plan import LogitShaping

PROMPT = [3, 5, 5, 9]
OUTPUT = [7, 5, 7, 11]
VOCAB = 40


def shaped(shaping: LogitShaping, logits: torch.Tensor, output: list[int] = OUTPUT) -> torch.Tensor:
    row = logits.clone()
    shape(row, shaping, PROMPT + output, len(PROMPT))
    return row


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(VOCAB)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([PROMPT + OUTPUT]), logits.clone()[None]
    )
    assert torch.equal(shaped(LogitShaping(repetition_penalty=penalty), logits), expected[0])


def test_presence_and_frequency_penalties_follow_openai_formula() -> None:
    # https://platform.openai.com/docs/guides/text-generation: logit -= count * frequency + (count > 0) * presence
    logits = torch.randn(VOCAB)
    expected = logits.clone()
    for token, count in {7: 2, 5: 1, 11: 1}.items():
        expected[token] -= count * 0.7 + 0.4
    result = shaped(LogitShaping(presence_penalty=0.4, frequency_penalty=0.7), logits)
    assert torch.allclose(result, expected, atol=1e-6)


def test_bad_words_are_those_of_transformers() -> None:
    from transformers import NoBadWordsLogitsProcessor

    words = [[8], [7, 11, 20], [7, 11], [11, 30], [5, 7, 11, 31]]
    logits = torch.randn(VOCAB)
    processor = NoBadWordsLogitsProcessor(words, eos_token_id=torch.tensor([0]))
    expected = processor(torch.tensor([PROMPT + OUTPUT]), logits.clone()[None])
    assert torch.equal(shaped(LogitShaping(bad_words=words), logits), expected[0])


def test_minimum_length_forbids_ends_only_as_long_as_it_must() -> None:
    logits = torch.randn(VOCAB)
    shaping = LogitShaping(min_tokens=5, ending_token_ids=[2, 4])
    assert torch.isinf(shaped(shaping, logits)[[2, 4]]).all()
    assert torch.equal(shaped(shaping, logits, [*OUTPUT, 1]), logits)


@pytest.mark.parametrize("num_output", [0, 4, 5, 6])
def test_minimum_length_is_that_of_transformers(num_output: int) -> None:
    from transformers import MinNewTokensLengthLogitsProcessor

    logits = torch.randn(VOCAB)
    output = [7] * num_output
    processor = MinNewTokensLengthLogitsProcessor(len(PROMPT), 5, [2, 4])
    expected = processor(torch.tensor([PROMPT + output]), logits.clone()[None])[0]
    shaping = LogitShaping(min_tokens=5, ending_token_ids=[2, 4])
    assert torch.equal(shaped(shaping, logits, output), expected)


def test_bias_is_that_of_transformers() -> None:
    from transformers import SequenceBiasLogitsProcessor

    logits = torch.randn(VOCAB)
    bias = {6: 100.0, 3: -2.5, 39: 0.25}
    processor = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    expected = processor(torch.tensor([PROMPT]), logits.clone()[None])[0]
    assert torch.allclose(shaped(LogitShaping(logit_bias=bias), logits), expected)


def test_bias_is_added() -> None:
    logits = torch.randn(VOCAB)
    result = shaped(LogitShaping(logit_bias={6: 100.0, 3: -2.5}), logits)
    assert result.argmax() == 6
    assert result[3] == logits[3] - 2.5


def test_no_other_token_is_allowed() -> None:
    logits = torch.randn(VOCAB)
    result = shaped(LogitShaping(allowed_token_ids=[6, 3], logit_bias={3: 1.0}), logits)
    assert result.isfinite().nonzero().flatten().tolist() == [3, 6]
    assert (result[6], result[3]) == (logits[6], logits[3] + 1.0)


def test_min_p_keeps_what_transformers_keeps() -> None:
    from transformers import MinPLogitsWarper

    logits = torch.randn(4, 200) * 3
    expected = torch.isfinite(MinPLogitsWarper(0.1)(None, logits.clone()))
    probabilities = torch.softmax(logits, dim=-1)
    _keep_min_p(probabilities, [0.1] * 4)
    assert torch.equal(probabilities > 0, expected)


def test_logprobs_rank_and_alternatives() -> None:
    logits = torch.randn(3, VOCAB)
    reference = torch.log_softmax(logits.double(), dim=-1)
    tokens = [4, int(logits[1].argmax()), 9]
    entries = token_logprobs(logits, tokens, [0, 3, 20])
    for row, (entry, token, count) in enumerate(zip(entries, tokens, [0, 3, 20], strict=True)):
        order = reference[row].argsort(descending=True).tolist()
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(reference[row, token]), abs=1e-5)
        assert entry.rank == order.index(token) + 1
        assert entry.top_token_ids == order[:count]
        assert entry.top_logprobs == pytest.approx(reference[row, order[:count]].tolist(), abs=1e-5)
