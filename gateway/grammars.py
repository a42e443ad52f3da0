"""Structured output: from a JSON schema, a regular expression, choices or a grammar to what the engine follows.

Called by the front's servers before a request is taken on. llguidance is imported by the first request that asks
for any of it. Nothing here decides tokens: that is the sampler's work.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from gateway.errors import GatewayError
from gateway.grammar_trial import GrammarTrial

MAX_GRAMMAR_CHARACTERS = 65_536
_trial = GrammarTrial()

WHITE_SPACE = r"[ \n]?"
"""Between the parts of a JSON text at most one character: a small model that may write spaces writes spaces."""


class GrammarError(GatewayError):
    """A constraint that cannot be followed; says where it is wrong."""


def from_json_schema(schema: str, white_space: str = WHITE_SPACE) -> str:
    """The grammar of the JSON texts that a schema allows; `white_space` is a regular expression. Raises
    GrammarError."""
    from llguidance import LLMatcher

    _check_size(schema)
    try:
        if not isinstance(json.loads(schema), dict):
            raise GrammarError("the JSON schema is not an object")
        overrides = {"whitespace_pattern": white_space}
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=overrides)  # type: ignore[arg-type]
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the JSON schema cannot be read: {error}") from None
    return _checked(grammar)


def from_json_object(white_space: str = WHITE_SPACE) -> str:
    """The grammar of any JSON object."""
    return from_json_schema('{"type": "object"}', white_space)


def from_regex(pattern: str) -> str:
    """The grammar of what a regular expression (of Rust's regex crate) matches as a whole. Raises GrammarError."""
    from llguidance import LLMatcher

    _check_size(pattern)
    return _checked(LLMatcher.grammar_from_regex(pattern))


def from_choices(choices: Sequence[str]) -> str:
    """The grammar of one of several texts. Raises GrammarError."""
    if not choices or not all(choices):
        raise GrammarError("the choices are empty, or one of them is")
    _check_size("".join(choices))
    quoted = [json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f") for text in choices]
    return _checked("start: " + "\n  | ".join(quoted))


def from_grammar(text: str) -> str:
    """A grammar as llguidance takes it (Lark), or in GBNF (`root ::= ...`, as llama.cpp has it). Raises
    GrammarError."""
    from llguidance.gbnf_to_lark import any_to_lark

    _check_size(text)
    try:
        grammar = any_to_lark(text)
    except Exception as error:  # the converter raises plain Exception among others
        raise GrammarError(f"the grammar is neither Lark (start: ...) nor GBNF: {error}") from None
    return _checked(grammar)


def try_with(tokenizer_file: Path) -> GrammarTrial:
    """From now on this process tries grammars with the tokenizer of the model that it serves. The caller closes what
    is returned."""
    global _trial
    _trial.close()
    _trial = GrammarTrial(tokenizer_file)
    return _trial


@lru_cache(maxsize=256)
def problem_of(grammar: str) -> str | None:
    """What is wrong with a grammar in the engine's own form; None if nothing is. The same schema comes with many
    requests: answers are kept. May take long, see grammar_trial: the front calls it in a thread first."""
    if len(grammar) > MAX_GRAMMAR_CHARACTERS + 1000:
        return _too_long(grammar)
    return _trial.problem_of(grammar)


def _checked(grammar: str) -> str:
    problem = problem_of(grammar)
    if problem is not None:
        raise GrammarError(problem)
    return grammar


def _check_size(text: str) -> None:
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise GrammarError(_too_long(text))


def _too_long(text: str) -> str:
    return f"a grammar of {len(text)} characters; allowed: up to {MAX_GRAMMAR_CHARACTERS}"
