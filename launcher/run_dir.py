"""The run folder of one deployment: its lock, its epoch, its logs and sockets, and what an earlier supervisor
left behind. Used by the supervisor alone; must hold the lock before it touches anything else."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.errors import LauncherError
from launcher.processes import ProcessId, all_processes, kill

RUN_ID_VARIABLE = "PHALANX_RUN_ID"
"""Environment variable by which every process of a deployment can be told from all others."""

_KEPT_WORLDS = 5
_MAX_SOCKET_PATH = 107  # sun_path of unix(7), without its final zero


class RunDirInUse(LauncherError):
    """Another supervisor holds the lock."""


class RunDir:
    """An open run folder. Close it to give up the lock."""

    def __init__(self, path: Path) -> None:
        """Makes the folder (mode 0700) and takes its lock. Raises RunDirInUse if another supervisor holds it,
        LauncherError if it cannot be made."""
        self.path = path.absolute()
        self.run_id = secrets.token_hex(6)
        self.control_socket = self.path / "control.sock"
        if len(os.fsencode(self.control_socket)) > _MAX_SOCKET_PATH:
            raise LauncherError(f"--run-dir {self.path}: too long for a socket; give a shorter path")
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.chmod(0o700)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LauncherError(f"--run-dir {self.path}: {error.strerror}; give another folder") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = self._read_record().get("supervisor", {}).get("pid", "unknown")
            os.close(self._lock)
            raise RunDirInUse(
                f"--run-dir {self.path}: in use by the supervisor with pid {owner}; "
                "stop it or give another folder"
            ) from None
        self._record: dict[str, Any] = {}

    def close(self) -> None:
        """Gives up the lock; the folder stays, with its logs."""
        with contextlib.suppress(OSError):
            self.control_socket.unlink()
        os.close(self._lock)

    # ----------------------------------------------------------------- epoch

    @property
    def epoch(self) -> int:
        """The highest epoch ever handed out here; 0 before the first."""
        try:
            return int((self.path / "epoch").read_text())
        except FileNotFoundError:
            return 0
        except ValueError:
            raise LauncherError(
                f"{self.path / 'epoch'} does not hold a number; write one higher than any world had so far"
            ) from None

    def raise_epoch(self) -> int:
        """Hands out the next epoch, which is on disk before this returns, so that no crash can hand it out
        twice."""
        epoch = self.epoch + 1
        temporary = self.path / "epoch.new"
        with temporary.open("w") as file:
            file.write(f"{epoch}\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self.path / "epoch")
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return epoch

    # ----------------------------------------------------------------- folders of worlds

    def world_dir(self, epoch: int) -> Path:
        """Logs of one world, and its temporary files in `tmp`."""
        return self.path / "worlds" / str(epoch)

    def shm_dir(self, epoch: int) -> Path:
        """The world's shared-memory folder."""
        base = Path("/dev/shm")
        if not os.access(base, os.W_OK):
            base = Path(tempfile.gettempdir())
        return base / f"phalanx-{self.run_id}-{epoch}"

    def make_world_dirs(self, epoch: int) -> None:
        """Makes both folders, and drops the logs of worlds long dead."""
        (self.world_dir(epoch) / "tmp").mkdir(mode=0o700, parents=True, exist_ok=True)
        self.shm_dir(epoch).mkdir(mode=0o700)
        folders = sorted(
            (p for p in (self.path / "worlds").iterdir() if p.name.isdigit()), key=lambda p: int(p.name)
        )
        for folder in folders[:-_KEPT_WORLDS]:
            shutil.rmtree(folder, ignore_errors=True)

    def remove_world_files(self, epoch: int) -> None:
        """Removes what a dead world leaves: shared memory and temporary files. Its logs stay."""
        shutil.rmtree(self.shm_dir(epoch), ignore_errors=True)
        shutil.rmtree(self.world_dir(epoch) / "tmp", ignore_errors=True)

    # ----------------------------------------------------------------- who runs

    def record(self, **processes: ProcessId | None) -> None:
        """Writes down who runs, by pid and start time, for people and for the next supervisor."""
        self._record["run_id"] = self.run_id
        for name, process in processes.items():
            self._record[name] = None if process is None else {"pid": process.pid, "start": process.start}
        temporary = self.path / "processes.json.new"
        temporary.write_text(json.dumps(self._record) + "\n")
        temporary.rename(self.path / "processes.json")

    def forget(self) -> None:
        """Removes the record: nothing runs any more."""
        with contextlib.suppress(OSError):
            (self.path / "processes.json").unlink()

    def _read_record(self) -> Mapping[str, Any]:
        try:
            content = json.loads((self.path / "processes.json").read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def remove_leftovers(self, timeout_s: float = 5.0) -> list[int]:
        """Ends what an earlier supervisor, killed in mid-run, left behind in this folder, and removes its
        shared memory. Returns the pids ended. Raises LauncherError if some outlive `timeout_s`."""
        run_id = self._read_record().get("run_id")
        if not isinstance(run_id, str) or not run_id.isalnum():
            return []
        ended: list[int] = []
        give_up_at = time.monotonic() + timeout_s
        while left := _processes_of_run(run_id):
            if time.monotonic() > give_up_at:
                pids = ", ".join(str(process.pid) for process in left)
                raise LauncherError(
                    f"processes of an earlier run do not end: {pids}; end them, then try again"
                )
            ended += [process.pid for process in left if kill(process) and process.pid not in ended]
            time.sleep(0.02)
        for folder in {self.shm_dir(0).parent, Path("/dev/shm")}:
            for leftover in folder.glob(f"phalanx-{run_id}-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        for temporary in (self.path / "worlds").glob("*/tmp"):
            shutil.rmtree(temporary, ignore_errors=True)
        self.forget()
        return ended


def _processes_of_run(run_id: str) -> list[ProcessId]:
    marker = f"{RUN_ID_VARIABLE}={run_id}".encode()
    found = []
    for stat in all_processes():
        try:
            variables = Path(f"/proc/{stat.pid}/environ").read_bytes()
        except OSError:
            continue
        if marker in variables.split(b"\0") and stat.state not in "ZX":
            found.append(ProcessId(stat.pid, stat.start))
    return found
