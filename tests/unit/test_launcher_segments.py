"""Shared memory that MPI keeps under names of its own: noted while its rank lives, removed with the world."""

from __future__ import annotations

import json
import mmap
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from launcher import segments
from launcher.segments import (
    SHARED_MEMORY,
    SegmentWatch,
    abandoned,
    mapped_by,
    note_before_kill,
    remove_shared_memory,
)
from launcher.watch import Phase


@pytest.fixture
def names() -> Iterator[list[str]]:
    made = [f"mpich_shm_test{os.getpid()}_{index}" for index in range(2)] + [f"weights-{os.getpid()}"]
    for name in made:
        (SHARED_MEMORY / name).write_bytes(bytes(4096))
    yield made
    for name in made:
        (SHARED_MEMORY / name).unlink(missing_ok=True)


def test_what_the_rank_had_goes_and_nothing_else(names: list[str], tmp_path: Path) -> None:
    own, foreign, weights = names
    shm_dir = tmp_path / "world"
    shm_dir.mkdir()
    watch = SegmentWatch(shm_dir, 3, os.getpid())
    watch.look(Phase.JOINING)
    assert not (shm_dir / "rank-3.segments").exists(), "it has mapped nothing yet"
    with (
        (SHARED_MEMORY / own).open("r+b") as file,
        (SHARED_MEMORY / weights).open("r+b") as other,
        mmap.mmap(file.fileno(), 0),
        mmap.mmap(other.fileno(), 0),
    ):
        assert {segment.name for segment in mapped_by(os.getpid())} == {own}
        watch.look(Phase.JOINING)
        assert (shm_dir / "rank-3.segments").exists(), "a file is made before it is mapped"
        watch.look(Phase.LOADING)
        [noted] = shm_dir.iterdir()
        noted.unlink()
        watch.look(Phase.LOADING)
        assert list(shm_dir.iterdir()) == [], "it writes only where something is new"
        noted.write_text(json.dumps([asdict(segment) for segment in mapped_by(os.getpid())]))
    remove_shared_memory(shm_dir)
    assert not shm_dir.exists()
    assert [(SHARED_MEMORY / name).exists() for name in names] == [False, True, True], (foreign, weights)


def test_a_name_that_means_another_file_by_now_stays(names: list[str], tmp_path: Path) -> None:
    path = SHARED_MEMORY / names[0]
    status = path.stat()
    entries = [
        {"name": names[0], "device": status.st_dev, "inode": status.st_ino + 1},
        {"name": names[2], "device": status.st_dev, "inode": (SHARED_MEMORY / names[2]).stat().st_ino},
        {"name": f"../{tmp_path}/kept", "device": 1, "inode": 1},
    ]
    (tmp_path / "rank-0.segments").write_text(json.dumps(entries))
    remove_shared_memory(tmp_path)
    assert path.exists() and (SHARED_MEMORY / names[2]).exists()


def test_nothing_of_a_process_that_is_gone(tmp_path: Path) -> None:
    assert mapped_by(2**22 + 1) == set()
    remove_shared_memory(tmp_path / "gone")


def test_what_was_made_in_mpi_init_and_is_nobodys_goes(names: list[str], tmp_path: Path) -> None:
    """A rank that is killed between the making of its segment and its guard's look."""
    foreign = names[1]
    os.utime(SHARED_MEMORY / foreign, (1.0, 1.0))
    shm_dir = tmp_path / "world"
    shm_dir.mkdir()
    watch = SegmentWatch(shm_dir, 0, 2**22 + 1)
    began = time.time() - 60.0
    watch.look(Phase.JOINING)
    os.utime(shm_dir / "rank-0.joining", (began, began))
    remove_shared_memory(shm_dir)
    left = [(SHARED_MEMORY / name).exists() for name in names]
    assert left == [False, True, True], f"{foreign} is older than the world"


def test_what_a_process_has_is_not_abandoned(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    since = time.time() - 60.0
    own = names[0]
    assert own in {segment.name for segment in abandoned(since)}
    with (SHARED_MEMORY / own).open("r+b") as file:
        assert own not in {segment.name for segment in abandoned(since)}, "it is open"
        mapped = mmap.mmap(file.fileno(), 0)
    with mapped:
        assert own not in {segment.name for segment in abandoned(since)}, "it is mapped"
    monkeypatch.setattr(segments, "_ALL_PROCESSES", 1)
    assert abandoned(since) == set(), "others may have it, whom one cannot see"


def test_past_mpi_init_nothing_is_taken_for_abandoned(names: list[str], tmp_path: Path) -> None:
    watch = SegmentWatch(tmp_path, 0, 2**22 + 1)
    watch.look(Phase.JOINING)
    assert (tmp_path / "rank-0.joining").exists()
    watch.look(Phase.LOADING)
    assert list(tmp_path.iterdir()) == []


def test_last_look_before_a_kill(names: list[str], tmp_path: Path) -> None:
    with (SHARED_MEMORY / names[0]).open("r+b") as file, mmap.mmap(file.fileno(), 0):
        note_before_kill(tmp_path, 1, os.getpid())
    remove_shared_memory(tmp_path)
    assert not (SHARED_MEMORY / names[0]).exists()
