"""The journal on disk: what it holds when it is opened again, after any end, and when the disk is full."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.disk_journal import DiskJournal
from gateway.journal import JournalCall, JournalEntry, JournalUnavailable
from gateway.journal_rows import JournalLocked
from gateway.journal_unwritten import CHUNK_TOKENS
from gateway.protocol import SamplingParams, TokenLogprobs
from tests.echo_world import ROOT
from tests.unit.disks import fill, small_disk

EVENTS = list[tuple[str, dict[str, Any]]]


class Events:
    """A log that remembers."""

    def __init__(self) -> None:
        self.seen: EVENTS = []

    def info(self, event: str, **fields: Any) -> None:
        self.seen.append((event, fields))

    warning = error = info

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.seen]


def opened(path: Path, log: Events | None = None, **options: Any) -> DiskJournal:
    return DiskJournal(path / "journal.sqlite", log or Events(), **options)


def entry(request_id: str, **fields: Any) -> JournalEntry:
    return JournalEntry(request_id, [1, 2], SamplingParams(seed=7), ["END"], -3, 1000.0, **fields)


def begin(journal: DiskJournal, call_id: str, *entries: JournalEntry, **fields: Any) -> JournalCall:
    call = JournalCall(call_id, "chat", 1000.5, **fields)
    journal.open_call(call)
    for one in entries:
        journal.accept(one, call)
    journal.commit(call)
    return call


def reported(token: int) -> TokenLogprobs:
    return TokenLogprobs(token, -0.5, 1, [token, 9], [-0.5, -2.0])


def killed(journal: DiskJournal) -> None:
    """What is left of a front that was killed: its file, and no lock."""
    journal.close()


# --------------------------------------------------------------------------- opened again


@pytest.mark.parametrize("sync", [False, True])
def test_everything_of_a_request_is_there_when_it_is_opened_again(tmp_path: Path, sync: bool) -> None:
    journal = opened(tmp_path, sync=sync)
    one = entry("r1", deadline_at=2000.0)
    two = entry("r2", output_token_ids=[50, 51])
    begin(journal, "c1", one, two, key="k", fingerprint=b"f", content=b"shape", on_disconnect="grace")
    journal.append("r1", 0, [5], [reported(5)], [reported(2)], num_cached_tokens=2)
    journal.append("r2", 2, [6, 7])
    journal.flush()
    journal.append("r1", 1, [8], [reported(8)])
    journal.flush()
    journal.add_crash(["r1", "r2"])
    journal.add_crash(["r1", "gone"])
    journal.acquit("r2")
    journal.flush()
    killed(journal)

    again = opened(tmp_path)
    [call] = again.unfinished_calls()
    assert (call.call_id, call.kind, call.key, call.fingerprint) == ("c1", "chat", "k", b"f")
    assert (call.content, call.on_disconnect, call.created) == (b"shape", "grace", 1000.5)
    first, second = call.entries
    assert list(again.unfinished()) == [first, second]
    assert first.output_token_ids == [5, 8] and first.logprobs == [reported(5), reported(8)]
    assert first.prompt_logprobs == [reported(2)] and first.deadline_at == 2000.0 and first.crashes == 2
    assert (first.params, first.stop, first.priority) == (SamplingParams(seed=7), ["END"], -3)
    assert second.output_token_ids == [50, 51, 6, 7] and second.num_given == 2 and second.crashes == 0
    assert again.last_number == 2
    assert call.num_cached_tokens(2) == 2 and second.num_cached_tokens is None

    # It goes on there, and a third front finds it finished.
    again.append("r1", 2, [9], [reported(9)])
    again.finish("r1", "stop", "END")
    again.flush()
    again.finish("r2", "length")
    again.flush()
    assert again.find_key("k") is not None
    killed(again)
    third = opened(tmp_path)
    assert third.unfinished_calls() == [] and len(third) == 0
    found = third.find("c1")
    assert found is not None and found.has_answer and found.ended_at is not None
    assert found.num_cached_tokens(1) == 2
    assert found.entries[0].output_token_ids == [5, 8, 9] and found.entries[0].stop_reason == "END"
    assert found.entries[0].logprobs == [reported(5), reported(8), reported(9)]
    assert found.entries[1].output_token_ids == [50, 51, 6, 7]
    third.close()


def test_long_requests_are_gathered_and_their_steps_go(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    begin(journal, "long", entry("r1"))
    begin(journal, "short", entry("r2"))
    journal.append("r2", 0, [1])
    for position in range(3 * CHUNK_TOKENS + 10):
        journal.append("r1", position, [position], [reported(position)])
        journal.flush()
    journal.finish("r2", "length")
    journal.flush()
    journal.tick(time.time())
    killed(journal)
    rows = sqlite3.connect(tmp_path / "journal.sqlite")
    assert rows.execute("SELECT count(*) FROM steps").fetchone()[0] <= CHUNK_TOKENS
    rows.close()
    [call] = opened(tmp_path).unfinished_calls()
    assert call.entries[0].output_token_ids == list(range(3 * CHUNK_TOKENS + 10))
    assert [found.token_id for found in call.entries[0].logprobs] == call.entries[0].output_token_ids


def test_one_that_waits_holds_no_steps_of_others(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    begin(journal, "waits", entry("r1"))
    begin(journal, "runs", entry("r2"))
    for position in range(5000):
        journal.append("r2", position, [position])
        journal.flush()
    journal.append("r1", 0, [7])
    journal.flush()
    for _ in range(5):
        journal.tick(time.time())
    assert journal._store is not None
    count = journal._store._connection.execute("SELECT count(*) FROM steps").fetchone()[0]
    assert count <= CHUNK_TOKENS
    killed(journal)
    one, two = opened(tmp_path).unfinished_calls()
    assert one.entries[0].output_token_ids == [7]
    assert two.entries[0].output_token_ids == list(range(5000))


def test_entries_without_a_call_end_with_the_front(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.accept(entry("r1"))
    journal.append("r1", 0, [5])
    journal.flush()
    killed(journal)
    assert list(opened(tmp_path).unfinished()) == []


def test_a_killed_process_leaves_every_token_that_it_flushed(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from gateway.log import configure_log\n"
        "from gateway.disk_journal import DiskJournal\n"
        "from tests.unit.test_gateway_disk_journal import begin, entry\n"
        "journal = DiskJournal(pathlib.Path(sys.argv[1]), configure_log())\n"
        "begin(journal, 'c', entry('a'), entry('b'))\n"
        "position = 0\n"
        "while True:\n"
        "    journal.append('a', position, [position])\n"
        "    journal.append('b', position, [position])\n"
        "    journal.flush()\n"
        "    position += 1\n"
        "    sys.stdout.write(f'{position}\\n'); sys.stdout.flush()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "journal.sqlite")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(700):
        said = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    said = max([said, *(int(line) for line in process.stdout.read().splitlines()[:-1])])
    process.wait()
    [call] = opened(tmp_path).unfinished_calls()
    lengths = {len(found.output_token_ids) for found in call.entries}
    assert len(lengths) == 1 and min(lengths) >= said  # both or none of a step
    assert all(found.output_token_ids == list(range(len(found.output_token_ids))) for found in call.entries)


def test_a_log_cut_anywhere_gives_a_beginning_of_what_was_written(tmp_path: Path) -> None:
    """As after a power loss without --journal-sync, if it takes the end of the file."""
    whole = tmp_path / "whole"
    whole.mkdir()
    journal = opened(whole)
    begin(journal, "c", entry("a"))
    for position in range(200):
        journal.append("a", position, [position])
        journal.flush()
    wal = (whole / "journal.sqlite-wal").read_bytes()
    database = (whole / "journal.sqlite").read_bytes()
    journal.close()
    cuts = random.Random(5).sample(range(len(wal)), 15)
    for number, cut in enumerate(sorted(cuts)):
        part = tmp_path / str(number)
        part.mkdir()
        (part / "journal.sqlite").write_bytes(database)
        (part / "journal.sqlite-wal").write_bytes(wal[:cut])
        again = opened(part)
        assert again.failing is None
        for call in again.unfinished_calls():
            tokens = call.entries[0].output_token_ids
            assert tokens == list(range(len(tokens)))
        again.close()


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    begin(journal, "c", entry("a"))
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert {path.name for path in tmp_path.iterdir()} >= {"journal.sqlite", "journal.sqlite-wal"}
    journal.close()


def test_two_fronts_never_have_one_journal(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    with pytest.raises(JournalLocked, match="in use by another front"):
        opened(tmp_path)
    journal.close()
    opened(tmp_path).close()


# --------------------------------------------------------------------------- files that cannot be used


def test_a_file_that_is_no_journal_is_moved_aside(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"not a database at all" * 1000)
    log = Events()
    journal = opened(tmp_path, log)
    assert log.names == ["journal moved aside"] and "not a database" in log.seen[0][1]["detail"]
    begin(journal, "c", entry("a"))
    assert journal.failing is None
    [aside] = tmp_path.glob("journal.sqlite.unusable-*")
    assert aside.read_bytes().startswith(b"not a database") and str(aside) == log.seen[0][1]["moved_to"]
    journal.close()


def test_a_damaged_journal_is_moved_aside(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    for number in range(200):
        begin(journal, f"c{number}", entry(f"r{number}", output_token_ids=list(range(200))))
    journal.close()
    path = tmp_path / "journal.sqlite"
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)
    log = Events()
    again = opened(tmp_path, log)
    assert log.names == ["journal moved aside"] and again.failing is None
    again.close()


def test_a_journal_of_a_newer_version_is_moved_aside(tmp_path: Path) -> None:
    opened(tmp_path).close()
    connection = sqlite3.connect(tmp_path / "journal.sqlite")
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    log = Events()
    opened(tmp_path, log).close()
    assert log.names == ["journal moved aside"]
    assert "newer version (schema 7, here 1)" in log.seen[0][1]["detail"]


def test_a_journal_of_another_tokenizer_is_moved_aside(tmp_path: Path) -> None:
    journal = opened(tmp_path, identity=b"one")
    begin(journal, "c", entry("a"))
    journal.close()
    log = Events()
    other = opened(tmp_path, log, identity=b"two")
    assert other.unfinished_calls() == [] and log.names == ["journal moved aside"]
    assert "another model's tokenizer; 1 calls in it are unfinished" in log.seen[0][1]["detail"]
    assert "put its journal aside" in (other.moved_aside or "")
    other.close()
    again = opened(tmp_path, identity=b"two")
    assert again.moved_aside is None
    again.close()


def test_a_batch_that_breaks_a_constraint_is_no_damage(tmp_path: Path) -> None:
    log = Events()
    journal = opened(tmp_path, log)
    begin(journal, "done", entry("a"))
    journal.finish("a", "stop")
    journal.flush()
    begin(journal, "runs", entry("b"))
    assert journal._store is not None
    taken = (journal._unwritten._next_number, "nobody", b"")  # a mistake
    journal._store._connection.execute("INSERT INTO requests (number, call, content) VALUES (?, ?, ?)", taken)
    with pytest.raises(JournalUnavailable, match="UNIQUE"):
        begin(journal, "new", entry("c"))
    journal.finish("c", None, error=("unavailable", "refused"))
    journal.append("b", 0, [5])
    journal.flush()
    journal.tick(time.time() + 2)
    assert journal.failing is None and journal.moved_aside is None
    assert log.names == ["journal cannot be written", "journal can be written again"]
    found = journal.find("done")
    assert found is not None and found.has_answer
    journal.close()
    [call] = opened(tmp_path).unfinished_calls()
    assert call.call_id == "runs" and call.entries[0].output_token_ids == [5]


def test_one_call_that_cannot_be_read_costs_no_other(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    begin(journal, "bad", entry("a"))
    begin(journal, "good", entry("b"))
    journal.append("b", 0, [5])
    journal.flush()
    journal.close()
    connection = sqlite3.connect(tmp_path / "journal.sqlite")
    connection.execute("UPDATE requests SET content = x'c1' WHERE call = 'bad'")
    connection.commit()
    connection.close()
    log = Events()
    again = opened(tmp_path, log)
    assert [call.call_id for call in again.unfinished_calls()] == ["good"]
    assert log.names == ["call cannot be taken up"] and again.moved_aside is None
    with pytest.raises(JournalUnavailable, match="the records of call bad"):
        again.find("bad")
    again.close()
    log = Events()
    opened(tmp_path, log).close()
    assert log.names == [], "told once"


def test_files_moved_aside_do_not_pile_up(tmp_path: Path) -> None:
    for _ in range(6):
        (tmp_path / "journal.sqlite").write_bytes(b"rubbish" * 1000)
        opened(tmp_path).close()
        (tmp_path / "journal.sqlite").unlink()
    assert len(list(tmp_path.glob("journal.sqlite.unusable-*"))) <= 4


def test_damage_found_while_it_runs_loses_nothing(tmp_path: Path) -> None:
    log = Events()
    journal = opened(tmp_path, log)
    begin(journal, "c", entry("a"))
    journal.append("a", 0, [5])
    journal.flush()
    assert journal._store is not None
    journal._store._connection.execute("DROP TABLE steps")
    journal.append("a", 1, [6])
    journal.flush()
    assert "no such table: steps" in (journal.failing or "")
    journal.append("a", 2, [7])
    journal.flush()
    journal.tick(time.time() + 2)
    assert journal.failing is None
    assert log.names == ["journal cannot be written", "journal moved aside", "journal can be written again"]
    journal.append("a", 3, [8])
    journal.flush()
    journal.close()
    [call] = opened(tmp_path).unfinished_calls()
    assert call.entries[0].output_token_ids == [5, 6, 7, 8]


def test_what_nobody_can_wait_for_any_more_is_ended(tmp_path: Path) -> None:
    journal = opened(tmp_path, retention_s=60)
    begin(journal, "c", entry("a"), key="k")
    journal.close()
    for path in tmp_path.glob("journal.sqlite*"):
        os.utime(path, (time.time() - 100, time.time() - 100))
    log = Events()
    again = opened(tmp_path, log, retention_s=60)
    assert again.unfinished_calls() == [] and log.names == ["journal too old"]
    found = again.find("c")
    assert found is not None and found.error is not None and found.error[0] == "unavailable"
    again.close()


# --------------------------------------------------------------------------- size


def test_finished_calls_go_after_their_time(tmp_path: Path) -> None:
    journal = opened(tmp_path, retention_s=60)
    for number in range(100):
        begin(journal, f"c{number}", entry(f"r{number}"))
        journal.finish(f"r{number}", "stop")
        journal.flush()
    begin(journal, "running", entry("r"))
    now = time.time()
    journal.tick(now + 50)
    assert journal.find("c0") is not None
    for _ in range(20):
        journal.tick(now + 70)
    assert all(journal.find(f"c{number}") is None for number in range(100))
    assert journal.find("running") is not None
    assert journal._store is not None
    for table in ("chunks", "requests", "calls"):
        count = journal._store._connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        assert count == (0 if table == "chunks" else 1), table
    journal.close()


def test_the_file_stays_within_its_bound_and_keeps_the_youngest(tmp_path: Path) -> None:
    bound = 4 << 20
    journal = opened(tmp_path, retention_s=1e6, max_bytes=bound)
    for number in range(400):  # 40 MB of requests
        begin(journal, f"c{number}", entry(f"r{number}", output_token_ids=[2**30] * 20_000))
        journal.append(f"r{number}", 20_000, [5])
        journal.finish(f"r{number}", "stop")
        journal.flush()
        journal.tick(time.time())
        assert journal.failing is None
    assert journal.find("c0") is None and journal.find("c399") is not None
    assert (tmp_path / "journal.sqlite").stat().st_size <= bound
    assert journal.size_bytes() < bound + (8 << 20)  # its log
    journal.close()


def test_a_file_full_of_running_requests_takes_no_more_and_loses_none(tmp_path: Path) -> None:
    journal = opened(tmp_path, max_bytes=1 << 20)
    running = []
    with pytest.raises(JournalUnavailable, match="full"):
        for number in range(100):
            begin(journal, f"c{number}", entry(f"r{number}", output_token_ids=[2**30] * 5_000))
            running.append(f"r{number}")
    assert running
    for request_id in running:
        journal.append(request_id, 5_000, [5])
    journal.flush()
    for request_id in running:
        journal.finish(request_id, "stop")
    journal.flush()
    deadline = time.time() + 3
    while journal.failing is not None:
        journal.tick(time.time() + 10)
        assert time.time() < deadline, journal.failing
    begin(journal, "new", entry("r"))
    journal.close()


# --------------------------------------------------------------------------- a disk that is full


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "small") as folder:
        yield folder


def test_a_full_disk_refuses_the_new_and_finishes_the_old(small: Path) -> None:
    log = Events()
    journal = opened(small, log)
    begin(journal, "c1", entry("r1"))
    begin(journal, "c2", entry("r2"), key="k2")
    fill(small)
    position = 0
    while journal.failing is None:
        journal.append("r1", position, list(range(position, position + 100)))
        journal.flush()
        position += 100
        assert position < 2_000_000
    assert "full" in journal.failing
    with pytest.raises(JournalUnavailable, match=r"refused.*full"):
        begin(journal, "c3", entry("r3"))
    for _ in range(3):
        journal.append("r1", position, [position])
        journal.flush()
        position += 1
    journal.append("r2", 0, [70, 71])
    journal.finish("r2", "length")
    journal.flush()
    journal.tick(time.time() + 2)
    assert journal.failing is not None and log.names == ["journal cannot be written"]  # said once
    found = journal.find("c2")
    assert found is not None and found.has_answer and journal.find_key("k2") is found

    (small / "filler").unlink()
    journal.tick(time.time() + 10)
    assert journal.failing is None and log.names[-1] == "journal can be written again"
    begin(journal, "c4", entry("r4"))
    journal.close()
    again = opened(small)
    assert [call.call_id for call in again.unfinished_calls()] == ["c1", "c4"]
    assert again.unfinished_calls()[0].entries[0].output_token_ids == list(range(position))
    found = again.find_key("k2")
    assert found is not None and found.entries[0].output_token_ids == [70, 71]
    again.close()


def test_a_front_can_start_on_a_full_disk(small: Path) -> None:
    fill(small)
    log = Events()
    journal = opened(small, log)
    assert journal.failing is not None and log.names == ["journal cannot be written"]
    with pytest.raises(JournalUnavailable):
        begin(journal, "c", entry("a"))
    (small / "filler").unlink()
    journal.tick(time.time() + 2)
    assert journal.failing is None
    begin(journal, "c", entry("b"))
    journal.close()
    assert len(opened(small).unfinished_calls()) == 1


def test_a_journal_on_a_full_disk_is_read_and_goes_on(small: Path) -> None:
    journal = opened(small)
    begin(journal, "c", entry("a"))
    journal.append("a", 0, [5])
    journal.flush()
    journal.close()
    fill(small)
    again = opened(small)
    assert again.unfinished_calls()[0].entries[0].output_token_ids == [5]
    again.append("a", 1, [6])
    again.finish("a", "length")
    again.flush()
    found = again.find("c")
    assert found is not None and found.entries[0].output_token_ids == [5, 6]
    again.close()


def test_a_log_on_a_full_disk_fails_nothing(small: Path) -> None:
    code = (
        "from gateway.log import configure_log\n"
        "log = configure_log()\n"
        "[log.error('journal cannot be written', detail='x' * 1000) for _ in range(20)]\n"
        "print('done')\n"
    )
    fill(small)
    with (small / "log").open("wb") as log:
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
    assert (result.returncode, result.stdout) == (0, "done\n")
