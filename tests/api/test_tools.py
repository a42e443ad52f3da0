"""Tool calls with the clients that people use: `openai` here, `anthropic` and `langchain-openai` in environments of
their own, against a real model on two ranks, one of which is killed within a call."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.api.conftest import MODEL
from tests.client_environments import client_environment
from tests.recovery.served import Served, processes_of

CLIENTS = Path(__file__).parent / "clients"
QUESTION: Any = [{"role": "user", "content": "What is the weather in Rome?"}]
DIGIT: Any = {"type": "integer", "minimum": 0, "maximum": 9}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 30},
                "days": {"type": "integer", "minimum": 0, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}},
}
NUMBERS: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {
                "numbers": {
                    "type": "array",
                    "items": {"type": "integer", "minimum": 0, "maximum": 99},
                    "minItems": 40,
                    "maxItems": 40,
                }
            },
            "required": ["numbers"],
            "additionalProperties": False,
        },
    },
}


def run_script(requirement: str, script: Path, *arguments: str) -> None:
    """Runs a script in the environment of a package; it fails where the script does."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(client_environment(requirement)), str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr


def rank_pid(served: Served) -> int:
    """A rank of the world that serves."""
    world = served.active_world()
    served.parked_spare()
    return int(next(p for p in processes_of(world) if "engine.rank" in " ".join(p.cmdline())).pid)


def test_a_call_is_forced_and_answered(api: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "temperature": 0, "max_tokens": 300, "tools": [WEATHER, CLOCK]}
    for choice in ({"type": "function", "function": {"name": "weather"}}, "required"):
        answer = api.chat.completions.create(
            messages=QUESTION, tool_choice=choice, parallel_tool_calls=False, **options
        )
        message = answer.choices[0].message
        assert answer.choices[0].finish_reason == "tool_calls" and message.content is None
        [call] = message.tool_calls or []
        assert call.type == "function"
        arguments = json.loads(call.function.arguments)
        assert call.function.name in ("weather", "clock")
        if call.function.name == "weather":
            assert isinstance(arguments["city"], str) and 0 <= arguments["days"] <= 9
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": "Sun."}
        after = api.chat.completions.create(messages=[*QUESTION, message, result], **options)
        assert after.choices[0].message.role == "assistant"


def test_a_rank_dies_within_a_call(served: Served, api: openai.OpenAI) -> None:
    options: Any = {
        "model": MODEL, "temperature": 0, "max_tokens": 600, "messages": QUESTION, "tools": [NUMBERS],
        "tool_choice": {"type": "function", "function": {"name": "add"}}, "n": 2,
    }  # fmt: skip
    rank, num_deltas = rank_pid(served), 0
    with api.chat.completions.stream(**options) as stream:
        for event in stream:
            num_deltas += event.type == "tool_calls.function.arguments.delta"
            if num_deltas == 20:
                os.kill(rank, signal.SIGKILL)
                num_deltas += 1
        final = stream.get_final_completion()
    assert num_deltas > 60
    for choice in final.choices:
        assert choice.finish_reason == "tool_calls"
        [call] = choice.message.tool_calls or []
        assert call.function.name == "add"
        assert len(json.loads(call.function.arguments)["numbers"]) == 40


def test_a_call_that_the_limit_cuts_off(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(
        model=MODEL, messages=QUESTION, tools=[NUMBERS], tool_choice="required", max_tokens=40, temperature=0
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "length"
    [call] = choice.message.tool_calls or []
    assert call.type == "function" and call.function.arguments.startswith('{"numbers"')


def test_part_lists_and_the_developer(api: openai.OpenAI) -> None:
    parts: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Name three"}, {"type": "text", "text": "colours."}],
        },
    ]
    plain: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name three\ncolours."},
    ]
    one, other = (
        api.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=12)
        for messages in (parts, plain)
    )
    assert one.choices[0].message.content == other.choices[0].message.content


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_anthropic_works_unchanged(served: Served) -> None:
    pid = rank_pid(served)
    run_script("anthropic==2.12.0", CLIENTS / "with_anthropic.py", served.url, MODEL, str(pid))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_langchain_openai_works_unchanged(served: Served) -> None:
    run_script("langchain-openai==1.7.0", CLIENTS / "with_langchain_openai.py", served.url, MODEL)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_litellm_works_unchanged(served: Served) -> None:
    # Its calls of /v1/responses want mcp, which it does not bring along.
    run_script("litellm==1.106.2 mcp==2.3.0", CLIENTS / "with_litellm.py", served.url, MODEL)
