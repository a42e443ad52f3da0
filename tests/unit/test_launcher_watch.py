"""The progress page, the messages between guard and supervisor, and dying with the parent."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.guard_messages import (
    Beat,
    FaultReport,
    Go,
    GuardHello,
    Introduce,
    Kill,
    Killed,
    Lease,
    Message,
    MessageError,
    RankFacts,
    from_bytes,
)
from launcher.lease_watch import LATER_S
from launcher.processes import ProcessId, is_alive
from launcher.watch import Phase, ProgressPage

MESSAGES: list[Message] = [
    GuardHello(3, 1, "n1", "boot/1", 10, 11, 12, 13),
    Beat(3, 1, "S", 5, 7, 2, 0.25, 1, 2, "tcp://127.0.0.1:4", 640, 0, 12.5),
    Beat(3, 1, "S", 7, 0, 0, 0.0, 0, 0, None, 0, 2**40, 0.0),
    FaultReport(3, 1, "killed", -9, "rank 1 was killed", 0.01, 'last "lines"\nü', 5, 7, 2, 0.5, "Traceback"),
    FaultReport(3, 1, "frozen", None, "stopped", 0.5, "", 4, 0, 0, 1.0, ""),
    Killed(3, 1),
    Kill(4),
    Go(4),
    Introduce(4, 10, 11, "boot/1"),
    Lease(4, 12.5),
    RankFacts(3, 1, python="3.11.7", mpi="Open MPI v5.0.11", weights="0123"),
]
WRONG: list[object] = [True, [], {}]


def test_page_shows_what_the_rank_wrote(tmp_path: Path) -> None:
    path = tmp_path / "page"
    reader = ProgressPage.create(path)
    assert reader.read().phase is Phase.STARTING
    assert reader.read().endpoint is None
    writer = ProgressPage.open(path)
    writer.enter(Phase.LOADING)
    writer.load(5, 2**40)
    writer.serve_at("tcp://127.0.0.1:43211")
    writer.hold_kv_blocks(640)
    writer.step(2**40, 1024)
    writer.collective()
    writer.collective()
    seen = reader.read()
    assert seen.phase is Phase.STEPPING
    assert (seen.step, seen.collective) == (2**40, 2)
    assert (seen.num_tokens, seen.kv_blocks) == (1024, 640)
    assert (seen.load_done, seen.load_total) == (5, 2**40)
    assert seen.endpoint == "tcp://127.0.0.1:43211"
    writer.step(2**40 + 1)
    assert reader.read().collective == 0
    writer.enter(Phase.IDLE)
    assert reader.read().phase is Phase.IDLE


def test_page_age_counts_from_the_last_write(tmp_path: Path) -> None:
    page = ProgressPage.create(tmp_path / "page")
    page.enter(Phase.IDLE)
    time.sleep(0.05)
    assert 0.05 <= page.read().age_s < 5
    page.collective()
    assert page.read().age_s < 0.05


def test_page_is_for_this_user_only(tmp_path: Path) -> None:
    ProgressPage.create(tmp_path / "page").close()
    assert (tmp_path / "page").stat().st_mode & 0o777 == 0o600


def test_a_rank_dies_with_its_lease(tmp_path: Path) -> None:
    page = ProgressPage.create(tmp_path / "page")
    page.lend(time.monotonic() + 60)
    program = (
        "import sys, time; from pathlib import Path; from launcher.watch import ProgressPage; "
        "from launcher.lease_watch import die_with_lease; "
        "die_with_lease(ProgressPage.open(Path(sys.argv[1]))); print(1, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "page")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as rank:
        assert rank.stdout is not None and rank.stdout.readline() == b"1\n"
        time.sleep(2 * LATER_S)
        assert rank.poll() is None
        page.lend(time.monotonic())
        assert rank.wait(10) == -9


def test_page_without_a_guard() -> None:
    page = ProgressPage.open(None)
    assert page.lease_ends_at is None
    page.step(3)
    assert page.read().step == 3
    page.close()


def test_endpoint_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="1024"):
        ProgressPage.open(None).serve_at("x" * 1025)


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_survive_the_wire(message: Message) -> None:
    assert from_bytes(message.to_bytes()) == message
    assert json.loads(message.to_bytes())["epoch"] == message.epoch


def test_unknown_key_is_ignored() -> None:
    values = {**json.loads(Kill(4).to_bytes()), "later": [1]}
    assert from_bytes(json.dumps(values).encode()) == Kill(4)


@pytest.mark.parametrize("message", MESSAGES)
def test_missing_key_and_wrong_type_are_refused(message: Message) -> None:
    values = json.loads(message.to_bytes())
    optional = {
        field.name for field in dataclasses.fields(message) if field.default is not dataclasses.MISSING
    }
    for name in values:
        without = json.dumps({k: v for k, v in values.items() if k != name}).encode()
        if name in optional:
            assert type(from_bytes(without)) is type(message)
        else:
            with pytest.raises(MessageError):
                from_bytes(without)
        for wrong in WRONG:
            with pytest.raises(MessageError):
                from_bytes(json.dumps({**values, name: wrong}).encode())


@pytest.mark.parametrize(
    "frame", [b"", b"{", b"[]", b"\xff", b'{"type":"nobody"}', b'{"type":[]}', b"[" * 60_000, b" " * 70_000]
)
def test_garbage_is_refused(frame: bytes) -> None:
    with pytest.raises(MessageError):
        from_bytes(frame)


@given(st.binary())
def test_any_bytes_are_a_message_or_refused(frame: bytes) -> None:
    with pytest.raises(MessageError):
        from_bytes(frame)


def test_die_with_parent() -> None:
    child = (
        "import time; from launcher.watch import die_with_parent\n"
        "die_with_parent(); print(1, flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "p.stdout.readline(); print(p.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        grandchild = ProcessId.of(int(process.stdout.readline()))
        assert grandchild is not None and is_alive(grandchild)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 5
        while is_alive(grandchild) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_alive(grandchild)
