"""The shard cache among processes: one builds, the rest wait; the bound holds; what is in use stays."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.models.errors import ModelError
from engine.models.locks import locked
from engine.models.shard_cache import ShardCache
from launcher.cache_command import model_name
from launcher.cli import main
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


class Disk:
    """A disk as full as a test wants it: what files take on the real one is taken from `others_leave`."""

    def __init__(self, root: Path, total: int, others_leave: int) -> None:
        self.root, self.total, self.others_leave = root, total, others_leave

    def usage(self, path: Path) -> SimpleNamespace:
        taken = sum(file.stat().st_size for file in self.root.rglob("*") if file.is_file())
        return SimpleNamespace(total=self.total, free=self.others_leave - taken)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk(tmp_path, total=100 * 2**20, others_leave=24 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", disk.usage)
    return disk


def test_the_last_tenth_of_a_disk_is_left_to_others(tmp_path: Path, disk: Disk) -> None:
    cache = ShardCache(tmp_path)
    first, second = (fill(cache, name, 5) for name in ("first", "second"))
    cache.make_room(4 * 2**20)
    assert first.is_dir() and second.is_dir(), "ten of a hundred megabytes stay free"
    disk.others_leave -= 1
    cache.make_room(4 * 2**20)
    assert (first.is_dir(), second.is_dir()) == (False, True)


def test_what_is_needed_may_take_all_but_the_last_hundredth(tmp_path: Path, disk: Disk) -> None:
    """A model that somebody wants to serve comes before the free tenth, and the disk never gets full."""
    cache = ShardCache(tmp_path)
    cache.make_room(23 * 2**20)
    with pytest.raises(
        ModelError, match=r"24 MiB are free, of which 1 MiB are left.*prune --all.*PHALANX_CACHE"
    ):
        cache.make_room(23 * 2**20 + 1)


def file_of(folder: Path, name: str, unused_days: float, kilobytes: int = 1024) -> Path:
    path = folder / name
    path.write_bytes(bytes(kilobytes * 2**10))
    last_used = time.time() - unused_days * 24 * 3600
    os.utime(path, (last_used, last_used))
    return path


def test_old_files_of_a_folder_in_use_go_before_other_folders(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, max_bytes=4 * 2**20)
    other = fill(cache, "other", 1)
    use = cache.use("kept")
    new = file_of(use.folder, "stage0-rank0-new.safetensors", 6)
    old = file_of(use.folder, "stage0-rank0-old.safetensors", 8)
    older = file_of(use.folder, "stage0-rank0-older.safetensors", 9)
    cache.make_room(2**19)
    assert (new.exists(), old.exists(), older.exists(), other.exists()) == (True, True, False, True)
    cache.make_room(4 * 2**20)
    assert (new.exists(), old.exists(), other.exists()) == (True, False, False)


def test_a_file_that_is_mapped_is_not_old(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model", num_layers=1)
    root = tmp_path / "cache"
    tensors = load(folder, root)
    (shard,) = shard_files(root)
    os.utime(shard, (0, 0))
    cache = ShardCache(root, max_bytes=0)
    cache.make_room(0)
    assert shard.exists()
    del tensors
    use = cache.use(shard.parent.name)
    cache.make_room(0)
    assert use.folder.is_dir() and not shard.exists()


def test_a_start_makes_a_file_new_again(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model", num_layers=1)
    tensors = load(folder, tmp_path / "cache")
    (shard,) = shard_files(tmp_path / "cache")
    os.utime(shard, (0, 0))
    del tensors
    cache = ShardCache(tmp_path / "cache")
    assert [file.path for file in cache.entries()[0].stale] == [shard]
    load(folder, tmp_path / "cache")
    assert not cache.entries()[0].stale


def test_halves_of_files_go_with_their_builders(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, max_bytes=0)
    use = cache.use("kept")
    left, built = (
        file_of(use.folder, f"stage0-rank{rank}-cut.4711.partial", unused_days=0) for rank in (0, 1)
    )
    (use.folder / "stage0-rank0-cut.lock").touch()
    with locked(use.folder / "stage0-rank1-cut.lock", lambda: None):
        cache.make_room(0)
    assert (left.exists(), built.exists()) == (False, True)


# --------------------------------------------------------------------------- a look at it

FOLDER = "5085360e6f40fd3f9b6c-tp2-pp1-bf16-int8-v3-x86_64-AVX512"


def test_pruning_says_what_it_would_remove_and_removes_just_that(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "shards", max_bytes=10 * 2**20)
    first, second, third = (fill(cache, name, 3) for name in ("first", "second", "third"))
    use = cache.use("first")
    assert cache.prune().entries == [], "the bound holds"
    announced = cache.prune(4 * 2**20, dry_run=True)
    assert first.is_dir() and second.is_dir() and third.is_dir()
    assert cache.prune(4 * 2**20) == announced
    assert announced.num_bytes == 6 * 2**20
    assert (first.is_dir(), second.is_dir(), third.is_dir()) == (True, False, False)
    assert [(entry.folder.name, entry.in_use) for entry in cache.entries()] == [("first", True)]
    assert cache.prune(0).entries == [], "what is in use stays, whatever is asked for"
    use.release()


def test_the_command_lists_and_prunes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path))
    assert main(["cache"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/shards: empty\n"
    cache = ShardCache(tmp_path / "shards")
    use = cache.use(FOLDER, tmp_path / "models" / "smollm2-135m-instruct-b179c9523d0e-v3")
    (use.folder / "stage0-rank0-cut.safetensors").write_bytes(bytes(3 * 2**20))
    fill(cache, "unused", 1)
    assert main(["cache", "list"]) == 0
    titles, unused, used, total = capsys.readouterr().out.splitlines()
    assert titles.split() == ["model", "shape", "weights", "size", "last", "used", "in", "use", "folder"]
    assert unused.split()[:4] == ["-", "-", "-", "1"] and " no " in unused
    assert used.split()[:5] == ["smollm2-135m-instruct", "tp2-pp1", "bf16-int8", "3", "MiB"]
    assert " yes " in used and used.endswith(FOLDER)
    assert total.startswith(f"{tmp_path}/shards: 4 MiB, of which 3 MiB in use; bound ")
    assert main(["cache", "prune", "--all"]) == 0
    assert "removed 1 MiB\n" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "shards").iterdir() if path.is_dir()) == [FOLDER]


def test_a_model_of_the_hub_is_listed_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "hub" / "models--HuggingFaceTB--SmolLM2-135M" / "snapshots" / "93efa2f0"
    assert model_name(str(path)) == "HuggingFaceTB/SmolLM2-135M"
    assert model_name(str(tmp_path)) == str(tmp_path)


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
