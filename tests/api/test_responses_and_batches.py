"""Responses, files and batches with OpenAI's own client: over the death of ranks, of the front and of the server."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.recovery.served import Served
from tests.tiny_models import make_tiny_llama

FLAGS = ("--tp", "2", "--dtype", "float32", "--max-num-seqs", "4", "--kv-cache-memory", "64MiB")
LONG: dict[str, Any] = {"max_output_tokens": 400, "extra_body": {"ignore_eos": True, "seed": 7}}
ENDED = ("completed", "incomplete", "failed", "cancelled", "expired")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", max_model_len=2048)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def served(model: Path, run_dir: Path) -> Iterator[Served]:
    with Served(str(model), run_dir, *FLAGS) as served:
        yield served


@pytest.fixture(scope="module")
def api(served: Served) -> openai.OpenAI:
    return client(served)


def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=10, timeout=120)


def wait(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


def ended_response(api: openai.OpenAI, response_id: str) -> Any:
    def look() -> Any:
        response = api.responses.retrieve(response_id)
        return response if response.status in ENDED else None

    return wait(look)


def ended_batch(api: openai.OpenAI, batch_id: str) -> Any:
    def look() -> Any:
        batch = api.batches.retrieve(batch_id)
        return batch if batch.status in ENDED else None

    return wait(look, 120)


def begin_batch(api: openai.OpenAI, count: int, max_tokens: int) -> Any:
    lines = [
        {
            "custom_id": f"line-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "messages": [{"role": "user", "content": f"number {number}"}],
                "max_tokens": max_tokens,
                "ignore_eos": True,
                "temperature": 0,
            },
        }
        for number in range(count)
    ]
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    file = api.files.create(file=("in.jsonl", content), purpose="batch")
    return api.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")


def results(api: openai.OpenAI, file_id: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in api.files.content(file_id).text.splitlines()]


def texts_of(events: list[Any]) -> str:
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


def test_a_response_and_its_stream(api: openai.OpenAI) -> None:
    model = api.models.list().data[0].id
    response = api.responses.create(model=model, input="abc", **LONG)
    assert response.status == "incomplete" and response.incomplete_details is not None
    assert response.usage is not None and response.usage.output_tokens == 400
    events = list(api.responses.create(model=model, input="abc", stream=True, **LONG))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert texts_of(events) == response.output_text != ""
    with api.responses.stream(model=model, input="abc", max_output_tokens=20) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created" and kinds[-1] in ("response.incomplete", "response.completed")
    follow = api.responses.create(
        model=model, input="more", previous_response_id=response.id, max_output_tokens=5, truncation="auto"
    )
    assert follow.previous_response_id == response.id
    assert [item.id for item in api.responses.input_items.list(response.id)]


class Colour(pydantic.BaseModel):
    name: Literal["red", "green"]
    is_warm: bool


def test_a_forced_call_and_a_parsed_answer(api: openai.OpenAI, served: Served) -> None:
    tool: Any = {
        "type": "function",
        "name": "paint",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "green"]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    }
    with api.responses.stream(
        model=served.model, input="Paint.", tools=[tool], tool_choice="required", parallel_tool_calls=False
    ) as stream:
        final = stream.get_final_response() if stream.until_done() else None
    assert final is not None
    [call] = [item for item in final.output if item.type == "function_call"]
    assert call.name == "paint" and json.loads(call.arguments)["colour"] in ("red", "green")
    items: Any = [
        {"role": "user", "content": "Paint."},
        {"type": "function_call", "call_id": call.call_id, "name": "paint", "arguments": call.arguments},
        {"type": "function_call_output", "call_id": call.call_id, "output": "Done."},
    ]
    parsed = api.responses.parse(model=served.model, input=items, text_format=Colour)
    assert parsed.output_parsed is not None and parsed.output_parsed.name in ("red", "green")


@pytest.mark.parametrize("victim", ["rank", "front"])
def test_a_stream_in_the_background_is_taken_up_where_it_broke(
    api: openai.OpenAI, served: Served, victim: str
) -> None:
    model = served.model
    undisturbed = list(api.responses.create(model=model, input="abc", stream=True, background=True, **LONG))
    world = served.active_world()
    stream = api.responses.create(model=model, input="abc", stream=True, background=True, **LONG)
    seen: list[Any] = []
    for event in stream:
        seen.append(event)
        if len(seen) == 20:
            pid = served.front().pid if victim == "front" else world["ranks"][1]["pid"]
            os.kill(pid, signal.SIGKILL)
            stream.close()
            break
    response_id = seen[0].response.id
    if victim == "rank":
        served.active_world(above=world["epoch"])
    after = seen[-1].sequence_number
    rest = list(api.responses.retrieve(response_id, stream=True, starting_after=after))
    assert [event.sequence_number for event in [*seen, *rest]] == list(range(len(undisturbed)))
    assert texts_of([*seen, *rest]) == texts_of(undisturbed)
    assert ended_response(api, response_id).output_text == texts_of(undisturbed)


def test_one_in_the_background_is_cancelled_and_deleted(api: openai.OpenAI, served: Served) -> None:
    response = api.responses.create(model=served.model, input="abc", background=True, **LONG)
    assert response.status in ("queued", "in_progress")
    assert api.responses.cancel(response.id).status == "cancelled"
    assert ended_response(api, response.id).status == "cancelled"
    api.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        api.responses.retrieve(response.id)


def test_interactive_requests_pass_the_lines_of_a_batch(api: openai.OpenAI, served: Served) -> None:
    batch = begin_batch(api, 80, 300)
    wait(lambda: api.batches.retrieve(batch.id).request_counts.completed >= 4)
    before = api.batches.retrieve(batch.id).request_counts.completed
    answer = api.completions.create(model=served.model, prompt="abc", max_tokens=10)
    assert answer.usage is not None
    after = api.batches.retrieve(batch.id).request_counts.completed
    # Four sequences run at a time, and 32 lines are with the server: without its priority the answer would have come
    # behind some thirty lines.
    assert after - before < 20 and after < 80
    api.batches.cancel(batch.id)
    assert ended_batch(api, batch.id).status == "cancelled"


def test_a_batch_survives_the_front_and_the_whole_server(
    api: openai.OpenAI, served: Served, model: Path, run_dir: Path
) -> None:
    batch = begin_batch(api, 120, 100)
    completed = wait(lambda: api.batches.retrieve(batch.id).request_counts.completed)
    served.front().kill()
    counts = api.batches.retrieve(batch.id).request_counts
    assert counts.completed >= completed and counts.total == 120
    wait(lambda: api.batches.retrieve(batch.id).request_counts.completed > counts.completed + 10)
    before = api.batches.retrieve(batch.id)
    assert before.status == "in_progress"
    served.stop()
    with Served(str(model), run_dir, *FLAGS) as again:
        api = client(again)
        assert api.batches.retrieve(batch.id).request_counts.completed >= before.request_counts.completed
        done = ended_batch(api, batch.id)
        assert done.status == "completed" and done.request_counts.completed == 120
        answers = results(api, done.output_file_id)
        assert [answer["custom_id"] for answer in answers] == [f"line-{n}" for n in range(120)]
        for answer in answers:
            assert answer["response"]["body"]["usage"]["completion_tokens"] == 100
        one = api.chat.completions.create(
            model=again.model,
            messages=[{"role": "user", "content": "number 60"}],
            max_tokens=100,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        of_line = answers[60]["response"]["body"]["choices"][0]["message"]["content"]
        assert of_line == one.choices[0].message.content
