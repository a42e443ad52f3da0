"""The run folder: lock, epoch, folders of worlds, leftovers of a killed supervisor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.errors import LauncherError
from launcher.processes import ProcessId, is_alive, kill, read_stat
from launcher.run_dir import RUN_ID_VARIABLE, RunDir, RunDirInUse
from tests.unit.disks import fill, small_disk


def test_one_supervisor_a_folder(tmp_path: Path) -> None:
    first = RunDir(tmp_path / "run")
    with pytest.raises(RunDirInUse, match="stop it or give another folder"):
        RunDir(tmp_path / "run")
    first.close()
    RunDir(tmp_path / "run").close()
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700


def test_epoch_grows_over_restarts(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert run_dir.epoch == 0
    assert [run_dir.raise_epoch(), run_dir.raise_epoch()] == [1, 2]
    run_dir.close()
    again = RunDir(tmp_path)
    assert again.raise_epoch() == 3
    again.close()


def test_the_epoch_grows_on_a_full_disk_too(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        folder = RunDir(disk)
        for _ in range(9):
            folder.raise_epoch()
        fill(disk)
        with pytest.raises(OSError):
            folder.write_json("record.json", {"a": 1})
        assert [folder.raise_epoch() for _ in range(3)] == [10, 11, 12]
        assert folder.epoch == 12
        folder.close()


def test_broken_epoch_is_never_guessed(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    (tmp_path / "epoch").write_text("\0\0")
    with pytest.raises(LauncherError, match="epoch"):
        run_dir.raise_epoch()
    run_dir.close()


def test_bad_places(tmp_path: Path) -> None:
    with pytest.raises(LauncherError, match="shorter path"):
        RunDir(tmp_path / ("x" * 120))
    (tmp_path / "file").touch()
    with pytest.raises(LauncherError, match="another folder"):
        RunDir(tmp_path / "file")


def test_folders_of_worlds(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    for epoch in range(1, 9):
        run_dir.make_world_dirs(epoch)
        assert run_dir.shm_dir(epoch).stat().st_mode & 0o777 == 0o700
        (run_dir.shm_dir(epoch) / "segment").touch()
        (run_dir.world_dir(epoch) / "rank-0.log").touch()
        run_dir.remove_world_files(epoch)
        assert not run_dir.shm_dir(epoch).exists()
        assert not (run_dir.world_dir(epoch) / "tmp").exists()
    assert sorted(folder.name for folder in (tmp_path / "worlds").iterdir()) == ["4", "5", "6", "7", "8"]
    run_dir.close()


def test_leftovers_of_a_killed_supervisor(tmp_path: Path) -> None:
    dead = RunDir(tmp_path)
    dead.record(supervisor=ProcessId.of(os.getpid()))
    dead.make_world_dirs(1)
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    with (
        subprocess.Popen(sleep, env={**os.environ, RUN_ID_VARIABLE: dead.run_id}) as left,
        subprocess.Popen(sleep, env={**os.environ, RUN_ID_VARIABLE: "0" * 12}) as stranger,
    ):
        dead.close()
        run_dir = RunDir(tmp_path)
        assert run_dir.remove_leftovers() == [left.pid]
        assert left.wait() == -9
        assert stranger.poll() is None
        stranger.kill()
    assert not dead.shm_dir(1).exists()
    assert run_dir.remove_leftovers() == []
    run_dir.close()


def test_a_process_is_its_pid_and_its_start() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        process = ProcessId.of(child.pid)
        assert process is not None and is_alive(process)
        another = ProcessId(process.pid, process.start + 1)
        assert not is_alive(another)
        assert not kill(another)
        assert child.poll() is None
        assert kill(process)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        stat = read_stat(child.pid)
        assert stat is not None and stat.state == "Z"
        assert not is_alive(process)
    assert read_stat(child.pid) is None and not kill(process)
