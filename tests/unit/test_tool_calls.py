"""Tool calls in the text of an answer: every format, whole, cut anywhere, cut off, and on any text at all."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.grammars import from_json_schema
from gateway.message_parser import MessageParser, Parsing
from gateway.tool_calls.formats import FORMATS, format_of_template
from gateway.tool_calls.grammar import FunctionShape, after_thinking, checked_calls, either, forced_calls
from gateway.tool_calls.pieces import Kind, Piece

TYPES = {"weather": {"city": "string", "days": "integer"}, "clock": {}}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTIONS = [FunctionShape("weather", SCHEMA), FunctionShape("clock", {"type": "object", "properties": {}})]

Found = tuple[str, str, list[tuple[str, str]]]
"""Thoughts, content, and the calls."""


def parsing(tool_format: str | None, **options: Any) -> Parsing:
    return Parsing(tool_format=tool_format, tools=TYPES, **options)


def joined(pieces: list[Piece]) -> Found:
    thoughts, content, calls = "", "", []
    for kind, text, call in pieces:
        if kind is Kind.REASONING:
            thoughts += text
        elif kind is Kind.CONTENT:
            content += text
        elif kind is Kind.CALL:
            assert call == len(calls)
            calls.append((text, ""))
        else:
            assert call == len(calls) - 1
            calls[call] = (calls[call][0], calls[call][1] + text)
    return thoughts, content, calls


def parse(options: Parsing, *parts: str) -> Found:
    parser = MessageParser(options)
    pieces = [piece for part in parts for piece in parser.feed(part)]
    return joined(pieces + parser.finish())


WEATHER = ("weather", {"city": "Rome"})
CLOCK = ("clock", {})
EXAMPLES = [
    (
        "hermes",
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>',
        "",
        [WEATHER],
    ),
    (
        "hermes",
        'I look.\n<tool_call>{"name": "clock", "arguments": {}}</tool_call>\n'
        '<tool_call>{"arguments": {"city": "Rome"}, "name": "weather"}</tool_call>\n Done.',
        "I look.Done.",
        [CLOCK, WEATHER],
    ),
    (
        "hermes",
        '<tool_call>[{"name": "clock", "arguments": {}}, {"name": "weather", "arguments": {"city": "Rome"}}]'
        "</tool_call>",
        "",
        [CLOCK, WEATHER],
    ),
    ("hermes", '<tool_call>{"name": "clock"}', "", [CLOCK]),
    ("hermes", '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}', "", [WEATHER]),
    ("hermes", "a < b <tool_", "a < b <tool_", []),
    ("hermes", "<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", []),
    ("hermes", '<tool_call>{"city": 1}</tool_call> x', '<tool_call>{"city": 1}</tool_call> x', []),
    ("llama3_json", '{"name": "weather", "parameters": {"city": "Rome"}}', "", [WEATHER]),
    (
        "llama3_json",
        '<|python_tag|>{"name": "clock", "parameters": {}}; {"name": "weather", "parameters": {"city": "Rome"}}',
        "",
        [CLOCK, WEATHER],
    ),
    ("llama3_json", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    ("llama3_json", "Hi {x}", "Hi {x}", []),
    ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}]', "", [WEATHER]),
    ("mistral", '[TOOL_CALLS]weather{"city": "Rome"}', "", [WEATHER]),
    (
        "mistral_args",
        '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}[TOOL_CALLS]clock[ARGS]{}',
        "",
        [WEATHER, CLOCK],
    ),
    ("mistral_args", '[TOOL_CALLS]weather[CALL_ID]abc123XYZ[ARGS]{"city": "Rome"}', "", [WEATHER]),
    ("mistral", "[TOOL_CALLS]nonsense", "[TOOL_CALLS]nonsense", []),
    ("phi4_mini_json", 'functools[{"name": "weather", "arguments": {"city": "Rome"}}]', "", [WEATHER]),
    ("phi4_mini_json", '<|tool_call|>[{"name": "clock", "arguments": {}}]<|/tool_call|>', "", [CLOCK]),
    ("granite", '<|tool_call|>[{"name": "weather", "arguments": {"city": "Rome"}}]', "", [WEATHER]),
    ("granite", '<tool_call>{"name": "clock", "arguments": {}}</tool_call>', "", [CLOCK]),
    ("pythonic", '[weather(city="Rome"), clock()]', "", [WEATHER, CLOCK]),
    ("pythonic", "[1, 2, 3]", "[1, 2, 3]", []),
    ("pythonic", "[other(a=1)]", "[other(a=1)]", []),
    ("gemma", "Well:\n```tool_code\nweather(city='Rome')\n```", "Well:", [WEATHER]),
    (
        "qwen3_coder",
        "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>",
        "",
        [WEATHER],
    ),
    (
        "qwen3_coder",
        "Yes <function=weather><parameter=city>Rome</parameter><parameter=days>3</parameter></function>",
        "Yes",
        [("weather", {"city": "Rome", "days": 3})],
    ),
    ("qwen3_coder", "<tool_call>\nno</tool_call>", "<tool_call>\nno</tool_call>", []),
]


@pytest.mark.parametrize(("name", "text", "content", "calls"), EXAMPLES)
def test_calls_are_found_whole_and_in_pieces(
    name: str, text: str, content: str, calls: list[tuple[str, Any]]
) -> None:
    options = parsing(name)
    whole = parse(options, text)
    assert whole[1] == content
    assert [(called, json.loads(arguments)) for called, arguments in whole[2]] == calls
    assert parse(options, *text) == whole
    for cut in range(len(text)):
        assert parse(options, text[:cut], text[cut:]) == whole


def test_a_call_that_is_cut_off_stays_a_call() -> None:
    assert parse(parsing("hermes"), '<tool_call>{"name": "weather", "arguments": {"city": "Ro') == (
        "", "", [("weather", '{"city": "Ro')],
    )  # fmt: skip
    text = "<tool_call><function=weather><parameter=city>Rome</parameter><parameter=days>"
    assert parse(parsing("qwen3_coder"), text)[2] == [("weather", '{"city": "Rome"')]


def test_the_name_comes_first_and_arguments_as_they_are_written() -> None:
    parser = MessageParser(parsing("hermes"))
    assert parser.feed('<tool_call>\n{"name": "wea') == []
    assert parser.feed('ther", "argu') == [Piece(Kind.CALL, "weather", 0)]
    assert parser.feed('ments": {"ci') == [Piece(Kind.ARGUMENTS, '{"ci', 0)]
    assert parser.feed('ty": "}"}') == [Piece(Kind.ARGUMENTS, 'ty": "}"}', 0)]
    assert parser.feed("}\n</tool_call>") == []


def test_only_one_call_is_shown_where_only_one_is_allowed() -> None:
    call = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    assert parse(parsing("hermes", only_one_call=True), call + call)[2] == [("clock", "{}")]


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({}, "<think>\nHm.\n</think>\n\nYes.", ("Hm.", "Yes.")),
        ({}, " Yes </think> no", ("", " Yes </think> no")),
        ({"is_thinking": True}, "\nHm. <th </think>\nYes.", ("Hm. <th", "Yes.")),
        ({"is_thinking": True}, "Hm. cut off ", ("Hm. cut off ", "")),
        ({"is_thinking": True}, "<think>a</think>b", ("a", "b")),
        ({"shows_reasoning": False}, "<think>a</think>b", ("", "b")),
    ],
)  # fmt: skip
def test_thoughts_come_before_the_answer(options: Any, text: str, expected: tuple[str, str]) -> None:
    wanted = parsing(None, reasoning="think", **options)
    assert parse(wanted, text) == (*expected, [])
    assert parse(wanted, *text) == (*expected, [])


def test_calls_come_behind_thoughts() -> None:
    text = (
        '<think>\nI need <tool_call>s.</think>\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    )
    found = parse(parsing("hermes", reasoning="think"), text)
    assert found == ("I need <tool_call>s.", "", [("clock", "{}")])


FRAGMENTS = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<|tool_call|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<function=",
     "<parameter=", "</parameter>", "</function>", "<think>", "</think>", "```tool_code", "```", "<|python_tag|>",
     "functools", '{"name": "clock", "arguments": {', '{"name": "weather"', '"parameters": ', "weather(", "city=",
     "clock", "[", "]", "{", "}", "(", ")", '"', "'", "\\", ",", ":", ";", ">", "\n", " ", "1", "-", "é"]
)  # fmt: skip
TEXTS = st.lists(st.one_of(FRAGMENTS, st.text(max_size=4)), max_size=24)
OPTIONS = st.builds(
    parsing,
    st.sampled_from([None, *FORMATS]),
    reasoning=st.sampled_from([None, "think", "granite"]),
    is_thinking=st.booleans(),
    only_one_call=st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(OPTIONS, TEXTS, st.integers(0, 200))
def test_any_text_means_the_same_however_it_is_cut(options: Parsing, parts: list[str], cut: int) -> None:
    text = "".join(parts)
    whole = parse(options, text)
    assert parse(options, *text) == whole
    assert parse(options, *parts) == whole
    # What has come out after some text is the same, too: a stream can be taken up there.
    first, second = MessageParser(options), MessageParser(options)
    once = joined(first.feed(text[:cut]))
    assert joined([piece for character in text[:cut] for piece in second.feed(character)]) == once


@pytest.mark.parametrize("name", [None, *FORMATS])
@pytest.mark.parametrize(
    "unit",
    ["<", "<tool_call>", "[TOOL_CALLS]", "[", "{", '{"name": "clock", "arguments": ', "clock(", "\\", '"', " ",
     "\n", "<|tool_call|>[", "<function=a>", "<tool_call><function=a><parameter=b>", "```tool_code\n", "<tool_cal"],
)  # fmt: skip
def test_time_grows_with_the_text_and_no_faster(name: str | None, unit: str) -> None:
    def seconds(size: int) -> float:
        text = unit * (size // len(unit))
        began = time.process_time()
        parse(parsing(name, reasoning="think"), text)
        return time.process_time() - began

    # Quadratic time would be 64 times as much; what is too short to measure is short enough. What shares the
    # processor's caches may slow one of the two down, not all three times.
    assert any(seconds(80_000) < 24 * max(seconds(10_000), 0.01) for _ in range(3))


def bytes_tokenizer() -> Any:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def accepts(grammar: str, text: str) -> bool:
    from llguidance import LLMatcher

    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    assert not failed, messages
    matcher = LLMatcher(bytes_tokenizer(), grammar, log_level=0)
    data = list(text.encode())
    return bool(matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting())


FORCED = [
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'),
    ("llama3_json", '{"name": "weather", "parameters": {"city": "Rome"}}'),
    ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}]'),
    ("mistral_args", '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}'),
    ("phi4_mini_json", '<|tool_call|>[{"name": "weather", "arguments": {"city": "Rome"}}]<|/tool_call|>'),
    ("granite", '<|tool_call|>[{"name": "weather", "arguments": {"city": "Rome"}}]'),
    ("pythonic", '[weather(city="Rome")]'),
    ("gemma", '```tool_code\nweather(city="Rome")\n```'),
    ("qwen3_coder",
     "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), FORCED)
def test_forced_calls_are_in_the_format_that_the_parser_reads(name: str, text: str) -> None:
    one = forced_calls(FORMATS[name], FUNCTIONS, {}, only_one=True)
    many = forced_calls(FORMATS[name], FUNCTIONS, {}, only_one=False)
    found = parse(parsing(name), text)
    assert (found[1], [(n, json.loads(a)) for n, a in found[2]]) == ("", [WEATHER])
    for grammar in (one, many):
        assert accepts(grammar, text)
        assert not accepts(grammar, text.replace("city", "town"))
        assert not accepts(grammar, text.replace("weather", "other"))
        assert not accepts(grammar, "I do not know.")
    assert accepts(checked_calls(FORMATS[name], FUNCTIONS, {}, only_one=False), text)
    assert accepts(checked_calls(FORMATS[name], FUNCTIONS, {}, only_one=False), "I do not know.")


def test_a_strict_schema_binds_where_the_model_calls_by_itself() -> None:
    grammar = checked_calls(FORMATS["hermes"], FUNCTIONS, {}, only_one=False)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    assert accepts(grammar, "Let me see.\n" + call + "\n" + call)
    assert not accepts(grammar, call.replace("city", "town"))


def test_every_format_forces_a_call_without_arguments() -> None:
    for form in FORMATS.values():
        grammar = forced_calls(form, FUNCTIONS[1:], {}, only_one=True)
        from llguidance import LLMatcher

        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
        assert not failed, messages


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("{% if tools %}<tool_call>{% endif %}", "hermes"),
        ("<tool_call>\n<function=example>", "qwen3_coder"),
        ("[TOOL_CALLS] [", "mistral"),
        ("[TOOL_CALLS]' + name + '[ARGS]'", "mistral_args"),
        ("Environment: ipython", "llama3_json"),
        ("<|start_of_role|>tools<|end_of_role|> <|tool_call|>", "granite"),
        ("<|tool|> <|tool_call|>", "phi4_mini_json"),
        ("nothing known", "hermes"),
    ],
)
def test_the_format_is_read_from_the_template(source: str, name: str) -> None:
    assert format_of_template(source) == name


def test_what_a_grammar_demands_begins_behind_the_thoughts() -> None:
    body = forced_calls(FORMATS["hermes"], FUNCTIONS, {}, only_one=True)
    call = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    begun = after_thinking(body, "<think>", "</think>", {}, has_begun=True)
    assert accepts(begun, "I want {to} know.\n</think>\n\n" + call)
    assert not accepts(begun, "I want {to} know.\n" + call)
    maybe = after_thinking(body, "<think>", "</think>", {}, has_begun=False)
    assert accepts(maybe, call) and accepts(maybe, "<think>\nHm.\n</think>\n" + call)
    assert not accepts(maybe, "<think>\nHm.\n</think>\nIt is noon.")
    # Special tokens stand for themselves: their text is none.
    named = after_thinking(body, "[THINK]", "[/THINK]", {"[THINK]": 300, "[/THINK]": 301}, has_begun=True)
    assert not accepts(named, "Hm.[/THINK]" + call)


def test_content_that_must_match_and_calls_are_alternatives() -> None:
    content = from_json_schema(
        '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
    )
    calls = forced_calls(FORMATS["hermes"], FUNCTIONS, {}, only_one=False)
    grammar = after_thinking(either(content, calls), "<think>", "</think>", {}, has_begun=True)
    call = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    for answer in ('{"a": 1}', call, call + "\n" + call):
        assert accepts(grammar, "Hm.</think>" + answer), answer
    assert not accepts(grammar, 'Hm.</think>{"b": 1}')
