"""Shared memory that MPI keeps under names of its own: noted while its rank lives, removed with the world."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.segments import SHARED_MEMORY, SegmentWatch, mapped_by, remove_shared_memory
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
    assert list(shm_dir.iterdir()) == [], "it has mapped nothing yet"
    with (
        (SHARED_MEMORY / own).open("r+b") as file,
        (SHARED_MEMORY / weights).open("r+b") as other,
        mmap.mmap(file.fileno(), 0),
        mmap.mmap(other.fileno(), 0),
    ):
        assert {segment.name for segment in mapped_by(os.getpid())} == {own}
        watch.look(Phase.LOADING)
        [noted] = shm_dir.iterdir()
        noted.unlink()
        watch.look(Phase.LOADING)
        assert list(shm_dir.iterdir()) == [], "it looks again only where something is new"
        watch.look(Phase.STEPPING)
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
