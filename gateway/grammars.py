"""Structured output: from a JSON schema, a regular expression, choices or a grammar to what the engine follows.

Called by the front's servers before a request is taken on. llguidance is imported by the first request that asks
for any of it. Nothing here decides tokens: that is the sampler's work.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import lru_cache

from gateway.errors import GatewayError

MAX_GRAMMAR_CHARACTERS = 65_536
CHECK_TIMEOUT_S = 10.0
STACK_BYTES = 4 * 1024 * 1024
MAX_MESSAGE_CHARACTERS = 1000
LONG_GRAMMAR = 4096
"""Characters; longer ones are checked in a process of their own, see problem_of."""

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


@lru_cache(maxsize=64)
def problem_of(grammar: str) -> str | None:
    """What is wrong with a grammar in the engine's own form; None if nothing is. The same schema comes with many
    requests: answers are kept. May take long, up to CHECK_TIMEOUT_S: the front calls it in a thread first.

    llguidance follows rules recursively: thousands of them, one inside the other, end the process by a stack
    overflow. What is long enough for that is tried in a process of its own first."""
    if len(grammar) > MAX_GRAMMAR_CHARACTERS + 1000:
        return _too_long(grammar)
    if len(grammar) <= LONG_GRAMMAR:
        return _validate(grammar)
    try:
        child = subprocess.run(
            [sys.executable, "-m", "gateway.grammars"],
            input=grammar.encode(errors="surrogatepass"),
            capture_output=True,
            timeout=CHECK_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"the grammar is too complex: it could not be checked within {CHECK_TIMEOUT_S:g} s"
    if child.returncode != 0:
        return "the grammar is too complex: its rules are nested too deeply"
    return child.stdout.decode() or None


def _validate(grammar: str) -> str | None:
    from llguidance import LLMatcher

    try:
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    except (ValueError, TypeError) as error:  # not valid Unicode
        return f"the grammar is not valid: {error}"
    # The message quotes the grammar, which may be long.
    return f"the grammar is not valid: {messages[0].strip()[:MAX_MESSAGE_CHARACTERS]}" if failed else None


def _try_apart() -> None:
    """In a process of its own: writes what is wrong with the grammar on standard input, or dies of it."""
    from llguidance import LLMatcher, LLTokenizer

    grammar = sys.stdin.buffer.read().decode(errors="replace")
    problem = _validate(grammar)
    if problem is None:
        matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
        matcher.compute_bitmask()
        problem = matcher.get_error() or None
    sys.stdout.write(problem or "")
    sys.stdout.flush()


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


if __name__ == "__main__":
    # With less stack than a rank has, so that what passes here passes there.
    threading.stack_size(STACK_BYTES)
    trial = threading.Thread(target=_try_apart)
    trial.start()
    trial.join()
