"""What a client reads behind an event id depends on the tokens alone: not on how they were cut into outputs, nor on
when it came back."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message

from gateway.http.answers import AnswerOptions, ChatAnswerBuilder, TextAnswerBuilder
from gateway.http.logprobs import Namer, PromptText
from gateway.http.reading import EventId, Reading
from gateway.http.streams import EventQueue, EventStream
from gateway.journal import JournalCall, JournalEntry
from gateway.live_request import read_text
from gateway.protocol import Output, SamplingParams
from gateway.text import TextModel
from tests.echo_world import END_TOKEN, echo_logprobs, write_text_folder
from tests.unit.http_asking import parse_events

STOPS = ["hello", "\u00e9t\u00e9", "ab"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return TextModel.from_folder(write_text_folder(tmp_path_factory.mktemp("model")))


class _Connected:
    """A reader of a stream whose call is of no interest."""

    is_in_world = True

    def cancel(self) -> None:
        pass


class Front:
    """One call as a front has it: its record, and outputs cut as the engine would."""

    def __init__(self, text: TextModel, choices: list[list[int]], case: dict[str, Any]) -> None:
        params = SamplingParams(max_tokens=1000, logprobs=2 if case["logprobs"] else None)
        entries = [JournalEntry(f"r{n}", [5, 6], params, case["stop"], 0, 1.0) for n in range(len(choices))]
        self.text = text
        self.case = case
        self.record = JournalCall("cmpl-1", "x", 1.0, entries=entries)
        self._all = choices
        self._live = [text.stream(case["stop"]) for _ in choices]

    def next_outputs(self, cuts: random.Random) -> list[tuple[int, Output]]:
        """What one step brings: some tokens of some choices, with the front's own text; journaled."""
        outputs = []
        for index, entry in enumerate(self.record.entries):
            if entry.ended or cuts.random() < 0.3:
                continue
            done = len(entry.output_token_ids)
            new = self._all[index][done : done + cuts.randint(1, 4)]
            ends = done + len(new) == len(self._all[index])
            reason = None if not ends else "stop" if new[-1:] == [END_TOKEN] else "length"
            logprobs = [echo_logprobs(token, 2) for token in new] if self.case["logprobs"] else None
            of_prompt = [echo_logprobs(6, 1)] if self.case["echo"] and done == 0 else None
            raw = Output(f"r{index}", done, new, reason, None, None, logprobs, of_prompt)  # type: ignore[arg-type]
            shown = read_text(self._live[index], entry, raw, [END_TOKEN])
            entry.output_token_ids += shown.token_ids
            entry.logprobs += shown.logprobs or []
            entry.prompt_logprobs = shown.prompt_logprobs or entry.prompt_logprobs
            if shown.finish_reason is not None:
                entry.ended, entry.finish_reason, entry.stop_reason = (
                    True,
                    shown.finish_reason,
                    shown.stop_reason,
                )
            outputs.append((index, shown))
        return outputs

    @property
    def ended(self) -> bool:
        return all(entry.ended for entry in self.record.entries)

    def connect(self, last_event_id: str | None) -> Client:
        return Client(self, last_event_id)


class Client:
    """One connection to a stream."""

    def __init__(self, front: Front, last_event_id: str | None) -> None:
        count, case = len(front.record.entries), front.case
        at = EventId(count) if last_event_id is None else EventId.parse(last_event_id, count)
        echo = [PromptText("#$", [5, 6], [0, 1])] if case["echo"] else []
        options = AnswerOptions(
            usage=True,
            running_usage=case["running_usage"],
            logprobs=case["logprobs"],
            echo=echo,
            choices_per_prompt=count,
        )
        kind = ChatAnswerBuilder if case["chat"] else TextAnswerBuilder
        answer = kind("cmpl-1", 1, "m", 2, options, Namer(front.text))
        begun = [index for index, place in enumerate(at.places) if place.begun]
        answer.go_on(begun, sum(place.tokens for place in at.places))
        self._queue = EventQueue()
        is_new = last_event_id is None and not any(e.output_token_ids for e in front.record.entries)
        places = None if is_new else at.places
        self.reading = Reading(
            front.record,
            self._queue,
            front.text,
            [END_TOKEN],
            shows_logprobs=case["logprobs"],
            places=places,
        )
        if places is not None:
            self.reading.catch_up()
        self._stream = EventStream(_Connected(), self._queue, answer, at)  # type: ignore[arg-type]

    def read_all(self) -> list[tuple[str, bytes]]:
        """The events, once the call has ended."""
        sent = b""

        async def send(message: Message) -> None:
            nonlocal sent
            sent += message.get("body", b"")

        async def run() -> None:
            never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            async with asyncio.timeout(5):
                await self._stream._send_events(send, never)

        asyncio.run(run())
        return parse_events(sent)


def seen(events: list[tuple[str, bytes]]) -> dict[str, Any]:
    """What a client has of a stream in the end, however it was cut."""
    result: dict[str, Any] = {"choices": {}, "usage": [], "running": None, "done": 0}
    for _, data in events:
        if data == b"[DONE]":
            result["done"] += 1
            continue
        chunk = json.loads(data)
        if not chunk["choices"]:
            result["usage"].append(chunk["usage"])
        for choice in chunk["choices"]:
            empty: dict[str, Any] = {"text": "", "roles": 0, "logprobs": [], "finish": []}
            has = result["choices"].setdefault(choice["index"], empty)
            if "delta" in choice:
                has["text"] += choice["delta"].get("content", "")
                has["roles"] += "role" in choice["delta"]
                has["logprobs"] += (choice["logprobs"] or {}).get("content", [])
            else:
                has["text"] += choice["text"]
                logprobs = choice["logprobs"]
                if logprobs:
                    has["logprobs"] += zip(
                        logprobs["tokens"], logprobs["token_logprobs"], logprobs["text_offset"], strict=True
                    )
            if choice["finish_reason"]:
                has["finish"].append((choice["finish_reason"], choice.get("stop_reason")))
    return result


# Bytes of text with many half characters and half stop strings, longer tokens, and special ones.
TOKENS = st.lists(
    st.one_of(
        st.sampled_from([*range(40, 110), END_TOKEN + 1]),
        st.integers(3, 264),
        st.just(1),
    ),
    min_size=1,
    max_size=24,
)
WORDS = st.lists(
    st.sampled_from(["hel", "lo", "ab", "a", "b", " w", "\u00e9", "t", "\U0001f600", "x"]), max_size=8
)
CASES = st.fixed_dictionaries(
    {
        "stop": st.lists(st.sampled_from(STOPS), max_size=2),
        "logprobs": st.booleans(),
        "chat": st.booleans(),
        "running_usage": st.booleans(),
        "echo": st.booleans(),
    }
)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), case=CASES, seed=st.integers(0, 2**32))
def test_a_stream_taken_up_anywhere_goes_on_exactly(
    text: TextModel, data: st.DataObject, case: dict[str, Any], seed: int
) -> None:
    case["echo"] = case["echo"] and not case["chat"]
    choices = []
    for _ in range(data.draw(st.integers(1, 3))):
        tokens = [*data.draw(TOKENS), *text.encode("".join(data.draw(WORDS))), *data.draw(TOKENS)]
        choices.append([*tokens, END_TOKEN] if data.draw(st.booleans()) else tokens)
    one, other = random.Random(seed), random.Random(seed + 1)

    front = Front(text, choices, case)
    client = front.connect(None)
    while not front.ended:
        for index, output in front.next_outputs(one):
            client.reading.put(index, output)
    undisturbed = client.read_all()
    expected = seen(undisturbed)
    assert expected["done"] == 1 and len(expected["usage"]) == 1
    assert all(len(choice["finish"]) == 1 for choice in expected["choices"].values())

    # Another front, which cuts the same tokens differently; the client comes back to it at any time, from any event.
    cut = data.draw(st.integers(0, len(undisturbed) - 1))
    last = undisturbed[cut - 1][0] if cut else None
    again = Front(text, choices, case)
    for _ in range(data.draw(st.integers(0, 12))):
        again.next_outputs(other)
    resumed = again.connect(last)
    while not again.ended:
        for index, output in again.next_outputs(other):
            resumed.reading.put(index, output)
    rest = resumed.read_all()
    assert seen([*undisturbed[:cut], *rest]) == expected
    # And the ids mean the same: a third client goes on from an event of the second.
    if len(rest) > 1:
        place = data.draw(st.integers(0, len(rest) - 2))
        third = again.connect(rest[place][0])
        assert seen([*undisturbed[:cut], *rest[: place + 1], *third.read_all()]) == expected


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "names 1 choices, the request has 2"),
        ("1.2.3", "names 3 choices, the request has 2"),
        ("x.1", "'x' is not a number"),
        ("1.-2", "is not a number"),
        ("1.\u0663", "is not a number"),
        ("1e.2.usage", "some of whose choices have not ended"),
        ("1.2.sausage", "names 3"),
        ("9" * 20_000, "too long"),
    ],
)
def test_what_is_no_event_id_is_refused(content: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        EventId.parse(content, 2)


def test_event_ids_come_back_as_they_were() -> None:
    at = EventId(3)
    assert EventId(1).advance(0, 3, False) == b"3"
    assert at.begin(1) == b".0."
    assert at.advance(0, 2, False) == b"2.0."
    assert at.advance(1, 1, True) == b"2.1e."
    assert EventId.parse("2.1e.", 3).encoded() == b"2.1e."
    at.advance(0, 0, True)
    at.advance(2, 7, True)
    assert at.usage() == b"2e.1e.7e.usage"
    again = EventId.parse("2e.1e.7e.usage", 3)
    assert again.has_usage and not again.is_done and again.done() == b"2e.1e.7e.done"
    assert EventId.parse("2e.1e.7e.done", 3).is_done
