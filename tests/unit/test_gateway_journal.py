"""The journal: order, positions, and what is left after requests end."""

from __future__ import annotations

import pytest

from gateway.journal import Journal, JournalEntry, PositionError
from gateway.protocol import SamplingParams


def entry(request_id: str) -> JournalEntry:
    return JournalEntry(request_id, [1, 2], SamplingParams(seed=7), ["END"], 0, 1000.0)


def test_tokens_are_appended_in_order() -> None:
    journal = Journal()
    journal.accept(entry("a"))
    journal.append("a", 0, [5, 6])
    journal.append("a", 2, [7])
    journal.append("a", 3, [])
    journal.flush()
    assert next(journal.unfinished()).output_token_ids == [5, 6, 7]


@pytest.mark.parametrize(("position", "expected"), [(0, 2), (1, 2), (3, 2)])
def test_a_repeated_or_missing_position_changes_nothing(position: int, expected: int) -> None:
    journal = Journal()
    journal.accept(entry("a"))
    journal.append("a", 0, [5, 6])
    with pytest.raises(PositionError) as error:
        journal.append("a", position, [7])
    assert (error.value.expected, error.value.got) == (expected, position)
    assert next(journal.unfinished()).output_token_ids == [5, 6]


def test_unfinished_requests_come_oldest_first() -> None:
    journal = Journal()
    for request_id in ("a", "b", "c"):
        journal.accept(entry(request_id))
    journal.finish("b", "stop")
    assert [found.request_id for found in journal.unfinished()] == ["a", "c"]
    assert len(journal) == 2


def test_an_id_is_taken_once() -> None:
    journal = Journal()
    journal.accept(entry("a"))
    with pytest.raises(ValueError, match="already"):
        journal.accept(entry("a"))


def test_nobody_writes_to_what_is_not_there() -> None:
    with pytest.raises(KeyError):
        Journal().append("a", 0, [1])


def test_crashes_are_counted_for_each_request() -> None:
    journal = Journal()
    journal.accept(entry("a"))
    journal.accept(entry("b"))
    journal.add_crash(["a", "gone"])
    journal.add_crash(["a", "b"])
    assert [(found.request_id, found.crashes) for found in journal.unfinished()] == [("a", 2), ("b", 1)]
