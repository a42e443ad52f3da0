"""The journal: order, positions, and what is left after requests end."""

from __future__ import annotations

import time

import pytest

from gateway.journal import Journal, JournalCall, JournalEntry, PositionError
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


def test_a_call_has_ended_with_its_last_request_and_is_found_again() -> None:
    journal = Journal(retention_s=60)
    call = JournalCall("c1", "text", 1000.0, key="k")
    journal.open_call(call)
    journal.accept(entry("a"), call)
    journal.accept(entry("b"), call)
    journal.commit(call)
    journal.finish("a", "stop")
    assert journal.find("c1") is call and journal.find_key("k") is call and call.ended_at is None
    journal.finish("b", "length")
    assert call.ended_at is not None and call.has_answer
    assert journal.find("c1") is call and journal.find_key("k") is call
    assert journal.unfinished_calls() == []
    journal.tick(call.ended_at + 59)
    assert journal.find("c1") is call
    journal.tick(call.ended_at + 61)
    assert journal.find("c1") is None and journal.find_key("k") is None


def test_a_call_that_failed_gives_up_its_key() -> None:
    journal = Journal()
    for number in range(3):  # each time as if it were new
        call = JournalCall(f"c{number}", "text", 1000.0, key="k")
        journal.open_call(call)
        journal.accept(entry(f"r{number}"), call)
        journal.finish(f"r{number}", None, error=("unavailable", "no world"))
    found = journal.find("c1")
    assert found is not None and found.error == ("unavailable", "no world") and found.key is None


def test_finished_calls_without_a_disk_are_bounded() -> None:
    journal = Journal(retention_s=1e9)
    for number in range(50):
        call = JournalCall(f"c{number}", "text", 1000.0)
        journal.open_call(call)
        big = entry(f"r{number}")
        big.prompt_token_ids = [1] * 100_000
        journal.accept(big, call)
        journal.finish(f"r{number}", "stop")
    journal.tick(time.time())
    kept = [number for number in range(50) if journal.find(f"c{number}")]
    assert kept == list(range(10, 50))
