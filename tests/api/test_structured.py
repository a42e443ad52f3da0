"""Structured output against a served model: whatever it draws at temperature 1 has the form that was asked for."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from gateway.client import Client, RequestFailed, SamplingParams
from tests.api.conftest import MODEL

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colours": {
            "type": "array",
            "items": {"enum": ["red", "green", "blue"]},
            "minItems": 1,
            "maxItems": 3,
        },
        "happy": {"type": "boolean"},
    },
    "required": ["name", "age", "colours", "happy"],
    "additionalProperties": False,
}
QUESTION: list[Any] = [{"role": "user", "content": "Describe a person."}]


def check_person(text: str) -> None:
    person = json.loads(text)
    assert list(person) == ["name", "age", "colours", "happy"]
    assert isinstance(person["name"], str) and len(person["name"]) <= 12
    assert type(person["age"]) is int and 0 <= person["age"] <= 120
    assert 1 <= len(person["colours"]) <= 3 and set(person["colours"]) <= {"red", "green", "blue"}
    assert isinstance(person["happy"], bool)
    assert not re.search(r"\s\s", re.sub(r'"[^"]*"', "_", text)), "white space is bounded"


def ask(api: openai.OpenAI, seed: int, **options: Any) -> Any:
    answer = api.chat.completions.create(
        model=MODEL, messages=QUESTION, seed=seed, **{"max_tokens": 300, "temperature": 1.0, **options}
    )
    return answer.choices[0]


@pytest.mark.parametrize("strict", [True, False])
def test_a_schema_is_kept_at_temperature_1(api: openai.OpenAI, strict: bool) -> None:
    schema = {"name": "person", "schema": PERSON, "strict": strict}
    wanted = {"type": "json_schema", "json_schema": schema}
    with ThreadPoolExecutor(8) as threads:
        choices = list(threads.map(lambda seed: ask(api, seed, response_format=wanted), range(8)))
    for choice in choices:
        assert choice.finish_reason == "stop"
        check_person(choice.message.content)
    assert len({choice.message.content for choice in choices}) > 4


def test_the_sdk_s_parse_helper(api: openai.OpenAI) -> None:
    from pydantic import BaseModel

    class Point(BaseModel):
        x: int
        label: str

    answer = api.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "x is 5 and the label is home. Answer in JSON."}],
        response_format=Point,
        temperature=0,
        max_tokens=80,
    )
    assert isinstance(answer.choices[0].message.parsed, Point)


def test_older_and_vllm_s_fields(api: openai.OpenAI) -> None:
    for fields in ({"guided_json": PERSON}, {"structured_outputs": {"json": json.dumps(PERSON)}}):
        check_person(ask(api, 3, extra_body=fields).message.content)


def test_json_object(api: openai.OpenAI) -> None:
    for seed in range(3):
        choice = ask(api, seed, response_format={"type": "json_object"}, temperature=0.7)
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        assert choice.message.content.startswith("{")


def test_regular_expressions_match_as_a_whole(api: openai.OpenAI) -> None:
    pattern = r"[A-Z][a-z]{2,8} [A-Z][a-z]{2,8}, (19|20)[0-9]{2}-[01][0-9]"
    for seed in range(5):
        choice = ask(api, seed, extra_body={"structured_outputs": {"regex": pattern}})
        assert re.fullmatch(pattern, choice.message.content) and choice.finish_reason == "stop"


def test_choices_and_grammars(api: openai.OpenAI) -> None:
    for seed in range(5):
        texts = ["very positive", "negative", "I am not sure."]
        assert ask(api, seed, extra_body={"guided_choice": texts}).message.content in texts
    lark = 'start: sum\nsum: number (" + " number){2}\nnumber: /[1-9][0-9]?/'
    gbnf = 'root ::= number " + " number " + " number\nnumber ::= [1-9] [0-9]?\n'
    for grammar in (lark, gbnf):
        text = ask(api, 1, extra_body={"structured_outputs": {"grammar": grammar}}).message.content
        assert re.fullmatch(r"[1-9][0-9]?( \+ [1-9][0-9]?){2}", text)


def test_with_logprobs_penalties_and_several_choices(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        n=3,
        seed=11,
        max_tokens=300,
        frequency_penalty=0.5,
        logprobs=True,
        response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}},
    )
    for choice in answer.choices:
        assert choice.message.content is not None and choice.logprobs is not None
        check_person(choice.message.content)
        assert choice.logprobs.content is not None
        shown = b"".join(bytes(entry.bytes or ()) for entry in choice.logprobs.content[:-1])
        assert shown.decode() == choice.message.content


def test_over_zeromq(zmq_endpoint: str) -> None:
    from gateway import grammars

    with Client(zmq_endpoint) as client:
        params = SamplingParams(max_tokens=60, grammar=grammars.from_regex("[a-z]{3}-[0-9]{3}"), seed=1)
        assert re.fullmatch("[a-z]{3}-[0-9]{3}", client.generate("Here is a code:", params).text)
        with pytest.raises(RequestFailed, match="not valid"):
            client.generate("Hi", SamplingParams(grammar="start: ("))
