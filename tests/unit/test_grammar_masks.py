"""What a grammar's mask does to a row of logits, against the tokens that llguidance itself says are allowed."""

from __future__ import annotations

import json
from pathlib import Path

import llguidance
import pytest
import torch

from engine.execution.grammar import MAX_PREPARED, Grammars
from engine.plan import SequenceParams, StepPlan
from gateway.grammars import from_json_schema, from_regex
from tests.echo_world import END_TOKEN, VOCAB_SIZE, write_text_folder

SCHEMA = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_folder(tmp_path_factory.mktemp("model")) / "tokenizer.json"


@pytest.fixture
def subject(tokenizer_file: Path) -> Grammars:
    return Grammars(tokenizer_file, VOCAB_SIZE, (END_TOKEN,))


def admit(subject: Grammars, handle: int, grammar: str, output: list[int] | None = None) -> None:
    params = SequenceParams(1.0, 1.0, 0, 0, 0, grammar=grammar, output_token_ids=output or [])
    subject.apply(StepPlan(1, 0, admitted=[(handle, params)]))


@pytest.mark.parametrize("grammar", [from_json_schema(SCHEMA), from_regex("[a-c]{2,5}x")])
def test_allowed_logits_stay_and_the_others_go(subject: Grammars, tokenizer_file: Path, grammar: str) -> None:
    tokenizer = llguidance.LLTokenizer(str(tokenizer_file), n_vocab=VOCAB_SIZE, eos_token=[END_TOKEN])
    reference = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
    admit(subject, 3, grammar)
    random = torch.Generator().manual_seed(1)
    for _ in range(12):
        allowed = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
        for token in range(VOCAB_SIZE):
            # One after another, on copies: nothing of the mask's own way.
            allowed[token] = reference.deep_copy().try_consume_tokens([token]) == 1
        logits = torch.randn(VOCAB_SIZE, generator=random)
        row = logits.clone()
        subject.constrain(row, 3)
        if reference.is_stopped():
            allowed[:] = False
            allowed[END_TOKEN] = True
        assert torch.equal(row[allowed], logits[allowed])
        assert torch.isinf(row[~allowed]).all()
        token = int(row.argmax())
        subject.advance(3, token)
        if reference.is_stopped():
            break
        reference.consume_token(token)


def test_a_grammar_that_allows_nothing_of_what_is_left_wins(subject: Grammars) -> None:
    grammar = from_regex("b+")
    admit(subject, 0, grammar)
    expected = torch.zeros(VOCAB_SIZE)
    subject.constrain(expected, 0)
    row = torch.where(torch.isfinite(expected), -torch.inf, 0.0)  # as bad words and a minimum length leave it
    subject.constrain(row, 0)
    assert torch.equal(row, expected)


def test_sequences_of_one_grammar_do_not_share_their_state(subject: Grammars) -> None:
    grammar = from_regex("(ab)+")
    admit(subject, 0, grammar)
    first = torch.zeros(VOCAB_SIZE)
    subject.constrain(first, 0)
    subject.advance(0, int(first.argmax()))
    admit(subject, 1, grammar)
    second, after = torch.zeros(VOCAB_SIZE), torch.zeros(VOCAB_SIZE)
    subject.constrain(second, 1)
    subject.constrain(after, 0)
    assert torch.equal(second, first) and not torch.equal(after, first)
    # One that comes back goes on where its tokens leave it.
    admit(subject, 2, grammar, [int(first.argmax())])
    again = torch.zeros(VOCAB_SIZE)
    subject.constrain(again, 2)
    assert torch.equal(again, after)


def test_few_grammars_are_kept(subject: Grammars) -> None:
    for number in range(2 * MAX_PREPARED):
        admit(subject, number % 4, from_regex(f"a{{{number + 1}}}"))
    assert len(subject._prepared) == MAX_PREPARED


def test_thousands_of_rules_in_each_other_do_not_end_the_process(subject: Grammars) -> None:
    """As a client without a front may send them: rank 0 bounds their length, and their nesting by that."""
    rules = 5000
    lines = ["start: r0", *(f'r{number}: "a" r{number + 1}' for number in range(rules)), f'r{rules}: "b"']
    admit(subject, 0, "\n".join(lines))
    logits = torch.zeros(VOCAB_SIZE)
    subject.constrain(logits, 0)
    assert torch.isfinite(logits).sum() == 1
