"""The shard cache among processes: one builds, the rest wait; the bound holds; what is in use stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.models.errors import ModelError
from engine.models.locks import locked
from engine.models.shard_cache import ShardCache
from tests.tiny_models import make_tiny_llama
from tests.unit.test_models_weights import load, shard_files

_LOADER = """
import hashlib, sys
from pathlib import Path
from tests.unit.test_models_weights import load

tensors = load(Path(sys.argv[1]), Path(sys.argv[2]), tp=int(sys.argv[3]), rank=(0, int(sys.argv[4])))
digest = hashlib.sha256()
for name in sorted(tensors):
    digest.update(name.encode() + tensors[name].numpy().tobytes())
print(digest.hexdigest(), flush=True)
sys.stdin.read()
"""


def start_loader(folder: Path, cache: Path, tp: int, rank: int) -> subprocess.Popen[str]:
    """A process that loads a rank's weights, prints their digest, and holds them until its input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", _LOADER, str(folder), str(cache), str(tp), str(rank)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"the loader ended with {process.wait()}"
    return line


def test_many_processes_build_a_world_at_once(tmp_path: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Two worlds of two ranks start together: each file is built once and all see the same bytes."""
    folder = make_tiny_llama(tmp_path / "model", num_heads=8, num_kv_heads=2, hidden=512, intermediate=2048)
    cache = tmp_path / "cache"
    for _ in range(2):
        for rank in range(2):
            processes.append(start_loader(folder, cache, 2, rank))
    digests = [first_line(process) for process in processes]
    assert digests[:2] == digests[2:]
    assert digests[0] != digests[1]
    assert len(shard_files(cache)) == 2
    assert not list(cache.glob("*/*.partial"))
    inodes = [file.stat().st_ino for file in shard_files(cache)]
    load(folder, cache, tp=2, rank=(0, 1))
    assert [file.stat().st_ino for file in shard_files(cache)] == inodes


def test_a_builder_that_is_killed_is_replaced(tmp_path: Path, processes: list[subprocess.Popen[str]]) -> None:
    folder = make_tiny_llama(tmp_path / "model", num_layers=8, num_heads=8, num_kv_heads=2, hidden=2048)
    cache = tmp_path / "cache"
    for _ in range(5):  # a machine under load may build the file before it can be killed
        builder = start_loader(folder, cache, 1, 0)
        processes.append(builder)
        deadline = time.monotonic() + 60
        while not list(cache.glob("*/stage*.partial")) and not shard_files(cache):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        builder.kill()
        builder.wait()
        if not shard_files(cache):
            break
        shard_files(cache)[0].unlink()
    assert list(cache.glob("*/stage*.partial")), "killed while it built"
    processes.append(start_loader(folder, cache, 1, 0))
    first_line(processes[-1])
    assert len(shard_files(cache)) == 1
    assert not list(cache.glob("*/stage*.partial"))


def fill(cache: ShardCache, name: str, megabytes: int) -> Path:
    use = cache.use(name)
    (use.folder / "file").write_bytes(bytes(megabytes * 2**20))
    use.release()
    time.sleep(0.01)  # so that last uses differ
    return use.folder


def test_the_least_recently_used_folders_go_first(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, max_bytes=10 * 2**20)
    first, second, third = (fill(cache, name, 3) for name in ("first", "second", "third"))
    cache.make_room(2**20)
    assert first.is_dir(), "ten megabytes are allowed, and that is what there would be"
    cache.use("first").release()
    cache.make_room(4 * 2**20)
    assert (first.is_dir(), second.is_dir(), third.is_dir()) == (True, False, True)
    cache.make_room(10 * 2**20)
    assert not first.exists()
    assert not third.exists()


def test_what_is_in_use_stays(tmp_path: Path, processes: list[subprocess.Popen[str]]) -> None:
    folder = make_tiny_llama(tmp_path / "model", num_layers=1)
    root = tmp_path / "cache"
    processes.append(start_loader(folder, root, 1, 0))
    first_line(processes[0])
    (shard,) = shard_files(root)
    cache = ShardCache(root, max_bytes=0)
    cache.make_room(0)
    assert shard.exists(), "another process has it mapped"
    processes[0].communicate("", timeout=30)
    cache.make_room(0)
    assert not shard.parent.exists()


def test_tensors_protect_their_folder_for_as_long_as_they_live(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model", num_layers=1)
    tensors = load(folder, tmp_path / "cache")
    last = tensors["layers.0.down.weight"][1:]
    del tensors
    cache = ShardCache(tmp_path / "cache", max_bytes=0)
    cache.make_room(0)
    assert shard_files(tmp_path / "cache"), "one view is enough"
    del last
    cache.make_room(0)
    assert not shard_files(tmp_path / "cache")


def test_folders_of_others_are_never_touched(tmp_path: Path) -> None:
    stranger = tmp_path / "holiday-pictures"
    stranger.mkdir()
    (stranger / "beach.jpg").write_bytes(bytes(2**20))
    cache = ShardCache(tmp_path, max_bytes=0)
    fill(cache, "own", 1)
    cache.make_room(2**20)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["holiday-pictures"]


def test_a_disk_that_is_too_full(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"MiB are free.*PHALANX_CACHE"):
        ShardCache(tmp_path).make_room(2**60)


def test_the_default_bound_leaves_most_of_the_disk(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    assert ShardCache(tmp_path).max_bytes <= min(50 * 2**30, status.f_blocks * status.f_frsize / 4)


# --------------------------------------------------------------------------- the lock

_HOLDER = """
import sys, time
from pathlib import Path
from engine.models.locks import locked
with locked(Path(sys.argv[1]), waiting=lambda: None) as lock:
    print("held", flush=True)
    while True:
        lock.beat()
        time.sleep(0.05)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True
    )
    assert first_line(process) == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_holder_that_works_is_waited_for(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    waits: list[float] = []

    def waiting() -> None:
        waits.append(time.monotonic())
        if waits[-1] - waits[0] > 1.5:
            holder.kill()

    with locked(tmp_path / "lock", waiting, stall_limit_s=0.5):
        assert waits[-1] - waits[0] > 1.5, "longer than the limit for holders that stand still"


def test_a_holder_that_is_frozen_is_given_up(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    with (
        pytest.raises(ModelError, match=r"makes no progress.*fuser"),
        locked(tmp_path / "lock", lambda: None, stall_limit_s=0.5),
    ):
        pass
    assert 0.4 < time.monotonic() - began < 5


def test_the_lock_of_a_killed_holder_is_free(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    with locked(tmp_path / "lock", lambda: pytest.fail("nobody holds it")):
        pass
