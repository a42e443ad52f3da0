"""What a client with little credit is sent, and what waits for it: windows over journal entries, no process."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from gateway.flow_control import UnreadTokens, Window
from gateway.journal import JournalEntry
from gateway.live_request import read_text
from gateway.protocol import Output, SamplingParams
from gateway.text import TextModel
from tests.echo_world import write_text_folder

EOS = (2,)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder: Path = tmp_path_factory.mktemp("text")
    write_text_folder(folder)
    return TextModel.from_folder(folder)


class Stream:
    """A request whose tokens are made piece by piece, as requests.py makes them."""

    def __init__(self, text: TextModel, token_ids: list[int], stop: list[str], num_given: int = 0) -> None:
        self.text = text
        params = SamplingParams(max_tokens=len(token_ids))
        self.entry = JournalEntry("r1", [5], params, stop, 0, 0.0, token_ids[:num_given])
        self.entry.num_given = num_given
        self.stream = text.stream(stop, [5])
        for token_id in token_ids[:num_given]:
            self.stream.push(token_id)
        self.left = token_ids[num_given:]

    def make(self, count: int) -> Output:
        """The next tokens, in the journal and then as an output."""
        tokens, self.left = self.left[:count], self.left[count:]
        position = len(self.entry.output_token_ids)
        reason = None if self.left else "length"
        shown = read_text(self.stream, self.entry, Output("r1", position, tokens, reason), EOS)  # type: ignore[arg-type]
        self.entry.output_token_ids += shown.token_ids
        self.entry.finish_reason = shown.finish_reason
        self.entry.stop_reason = shown.stop_reason
        self.entry.ended = shown.finish_reason is not None
        return shown


def give(window: Window, stream: Stream, output: Output | None) -> list[Output]:
    if output is not None and (whole := window.take(output)) is not None:
        return [whole]
    return list(window.more(stream.entry, stream.text, EOS))


@pytest.mark.parametrize("seed", range(30))
def test_whatever_the_credit_a_client_gets_the_same(text: TextModel, seed: int) -> None:
    rng = random.Random(seed)
    # Characters of several bytes, so that text is held back at borders.
    tokens = text.encode("\u00e9t\u00e9 \u00e0 midi, stop here \U0001f600 and there" * 2)
    stop = ["there"] if seed % 2 else []
    num_given = seed % 3
    whole = Stream(text, tokens, stop, num_given)
    expected = whole.make(len(tokens))
    stream = Stream(text, tokens, stop, num_given)
    credit = rng.randrange(6)
    window = Window(credit, num_given)
    shown: list[Output] = []
    while not (shown and shown[-1].finish_reason):
        if stream.entry.finish_reason is None and rng.random() < 0.5:
            shown += give(window, stream, stream.make(rng.randrange(1, 4)))
        else:
            more = rng.randrange(1, 5)
            credit += more
            window.grant(more)
            shown += give(window, stream, None)
        assert sum(len(output.token_ids) for output in shown) <= credit
    position = num_given
    for output in shown:
        assert output.position == position
        position += len(output.token_ids)
    assert [token for output in shown for token in output.token_ids] == expected.token_ids
    assert "".join(output.text or "" for output in shown) == expected.text
    assert (shown[-1].finish_reason, shown[-1].stop_reason) == (expected.finish_reason, expected.stop_reason)


def test_a_reader_that_keeps_up_gets_the_outputs_as_they_are(text: TextModel) -> None:
    stream = Stream(text, text.encode("abcdef"), [])
    window = Window(10, 0)
    output = stream.make(3)
    assert window.take(output) is output


def test_the_oldest_unread_request_gives_way() -> None:
    unread: UnreadTokens[str] = UnreadTokens(100)
    unread.add("one", 60)
    unread.add("two", 40)
    assert unread.take_excess() == []
    unread.add("one", 50)
    unread.add("three", 30)
    assert unread.take_excess() == ["one"]
    unread.remove("two")
    unread.remove("two")
    unread.add("four", 70)
    assert unread.take_excess() == []
