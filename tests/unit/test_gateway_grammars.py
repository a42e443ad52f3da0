"""Structured output: what becomes a grammar, what such a grammar allows, and what is refused with which words."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import llguidance
import pytest

from gateway import grammars
from gateway.grammars import GrammarError
from tests.echo_world import EchoCluster
from tests.unit.http_asking import CHAT, TEXT, ask, chat

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
    "required": ["x", "y"],
    "additionalProperties": False,
}


def allows(grammar: str, text: str) -> bool:
    """Whether a text is one of the grammar, byte for byte."""
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def test_a_schema_allows_its_texts_with_little_white_space() -> None:
    grammar = grammars.from_json_schema(json.dumps(POINT))
    assert allows(grammar, '{"x":1,"y":-2}') and allows(grammar, '{"x": 1, "y": -2}')
    assert allows(grammar, '{\n"x": 1,\n"y": 2\n}')
    assert not allows(grammar, '{"x":  1,"y":2}'), "two spaces"
    assert not allows(grammar, '{"x": 1}') and not allows(grammar, '{"x": 1, "y": 2, "z": 3}')
    tight = grammars.from_json_schema(json.dumps(POINT), "")
    assert allows(tight, '{"x":1,"y":2}') and not allows(tight, '{"x": 1,"y":2}')


def test_a_schema_cannot_loosen_the_white_space() -> None:
    grammar = grammars.from_json_schema(json.dumps({**POINT, "x-guidance": {"whitespace_pattern": " *"}}))
    assert not allows(grammar, '{"x":  1,"y":2}')


def test_json_objects_regular_expressions_and_choices() -> None:
    anything = grammars.from_json_object()
    assert allows(anything, '{"a": [1, {"b": null}]}') and not allows(anything, "[1]")
    number = grammars.from_regex(r"[0-9]{3}-/?[a-z]+")
    assert allows(number, "123-/ab") and not allows(number, "123-") and not allows(number, "x123-ab")
    texts = ['say "hi"', "back\\slash\n", "é😀\x07\x7f", "say"]
    choice = grammars.from_choices(texts)
    assert all(allows(choice, text) for text in texts) and not allows(choice, "sa")


@pytest.mark.parametrize("text", ['start: "yes" | "no"', 'root ::= "yes" | "no"\n'])
def test_grammars_of_both_kinds(text: str) -> None:
    grammar = grammars.from_grammar(text)
    assert allows(grammar, "yes") and allows(grammar, "no") and not allows(grammar, "maybe")


def test_deep_grammars_do_not_end_the_process() -> None:
    def chain(length: int) -> str:
        rules = "\n".join(f"r{number}: r{number + 1} r{number + 1}" for number in range(length))
        return f'start: r0\n{rules}\nr{length}: "a"'

    assert grammars.from_grammar(chain(500))
    with pytest.raises(GrammarError, match="nested too deeply"):
        grammars.from_grammar(chain(3000))
    began = time.monotonic()
    with pytest.raises(GrammarError, match="nested too deeply"):
        grammars.from_grammar(chain(3000))
    assert time.monotonic() - began < 0.05, "it is remembered"


# --------------------------------------------------------------------------- over HTTP


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    with EchoCluster(tmp_path_factory.mktemp("run"), step_s=0.002) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "p", "schema": POINT, "strict": True, "description": "a point"},
            }
        },
        {"structured_outputs": {"json": POINT}},
        {"structured_outputs": {"json": json.dumps(POINT), "whitespace_pattern": " ?"}},
        {"structured_outputs": {"regex": "a+"}},
        {"structured_outputs": {"choice": ["a", "b"]}},
        {"structured_outputs": {"grammar": 'start: "a"', "disable_fallback": True}},
        {"structured_outputs": {"json_object": True}},
        {"structured_outputs": None, "guided_json": None},
        {"guided_json": POINT},
        {"guided_regex": "a+"},
        {"guided_choice": ["a", "b"]},
        {"guided_grammar": 'root ::= "a"'},
        {"json_schema": json.dumps(POINT)},
        {"regex": "a+"},
        {"ebnf": 'root ::= "a"'},
    ],
)
def test_every_way_of_asking(cluster: EchoCluster, fields: dict[str, object]) -> None:
    assert ask(cluster, CHAT, {**chat("abc"), **fields})[0] == 200
    assert ask(cluster, TEXT, {"prompt": "abc", **fields})[0] == 200


SCHEMA = "response_format.json_schema.schema"


def schema(content: object) -> dict[str, object]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": content}}}


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format.type", "text, json_object, json_schema"),
        ({"response_format": {}}, "response_format", "missing required field `type`"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "json_schema is missing",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            SCHEMA,
            "schema is missing",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema",
            "missing required field `name`",
        ),
        (schema({"type": "strong"}), SCHEMA, "Invalid type: strong"),
        (schema({"$ref": "#/nowhere"}), SCHEMA, "does not exist"),
        (schema({"$ref": "#"}), SCHEMA, "no text matches it; a rule or a $ref may lead back to itself"),
        (schema({"enum": ["x" * 70_000]}), SCHEMA, "allowed: up to 65536"),
        ({"guided_json": "[1]"}, "guided_json", "not an object"),
        ({"guided_json": "{"}, "guided_json", "cannot be read"),
        ({"guided_json": "[" * 5000}, "guided_json", "cannot be read"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "unclosed group"),
        ({"guided_regex": "(?=a)b"}, "guided_regex", "look-around"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "empty"),
        ({"guided_choice": ["a", ""]}, "guided_choice", "empty"),
        ({"guided_choice": "a"}, "guided_choice", "got `str`"),
        ({"guided_grammar": "start: b"}, "guided_grammar", "unknown name"),
        ({"guided_grammar": "root ::= ("}, "guided_grammar", "Expected ')'"),
        ({"guided_grammar": "root ::= x"}, "guided_grammar", "Rule 'x' not found"),
        (
            {"structured_outputs": {"structural_tag": "{}"}},
            "structured_outputs.structural_tag",
            "not supported",
        ),
        (
            {"guided_regex": "a", "guided_choice": ["a"]},
            "guided_choice",
            "guided_regex, guided_choice exclude each other",
        ),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "exclude"),
        ({"guided_choice": ["a"], "regex": "a"}, "regex", "guided_choice, regex exclude each other"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    cluster: EchoCluster, fields: dict[str, object], param: str, says: str
) -> None:
    for path, body in ((CHAT, chat("abc")), (TEXT, {"prompt": "abc"})):
        status, _, answer = ask(cluster, path, {**body, **fields})
        assert status == 400, answer
        assert says in answer["error"]["message"]
        assert answer["error"]["param"] == param
        assert len(answer["error"]["message"]) < 1500
        assert "<state>" not in answer["error"]["message"], "the inside of a library"


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        # A line of JSON schema whose automaton takes half a minute to make.
        (lambda: grammars.from_json_schema('{"type": "integer", "multipleOf": 999983}'), "takes more than"),
        (
            lambda: grammars.from_grammar("start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
            "too complex|not valid",
        ),
        (lambda: grammars.from_grammar("start: r0\n" + _nested_rules(1500)), "too complex|not valid"),
    ],
)
def test_what_would_hold_up_or_end_a_rank_is_refused_and_the_next_one_is_not(
    grammar: Callable[[], str], says: str
) -> None:
    began = time.monotonic()
    with pytest.raises(GrammarError, match=says):
        grammar()
    assert time.monotonic() - began < 60
    assert grammars.problem_of(f'start: "after {says}"') is None


def _nested_rules(count: int) -> str:
    return "\n".join(f'r{number}: "a" r{number + 1} "b"' for number in range(count)) + f'\nr{count}: "c"\n'
