"""The run folder of one deployment: its lock, its epoch, its logs and sockets, and what an earlier supervisor
left behind. Used by the supervisor alone; must hold the lock before it touches anything else."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from launcher.errors import LauncherError
from launcher.processes import ProcessId, all_processes, environment_of, kill
from launcher.segments import remove_shared_memory

RUN_ID_VARIABLE = "PHALANX_RUN_ID"
"""Environment variable by which every process of a deployment can be told from all others."""

EPOCH_VARIABLE = "PHALANX_EPOCH"
"""Environment variable that holds the epoch, in every process of a world; the front has none."""

ADDRESS_FILE = "http-address"
_KEPT_WORLDS = 5
_MAX_SOCKET_PATH = 107  # sun_path of unix(7), without its final zero


class RunDirInUse(LauncherError):
    """Another supervisor holds the lock; `supervisor` if it has written down which."""

    def __init__(self, message: str, supervisor: ProcessId | None) -> None:
        super().__init__(message)
        self.supervisor = supervisor


class RunDir:
    """An open run folder. Close it to give up the lock."""

    def __init__(self, path: Path) -> None:
        """Makes the folder (mode 0700, if it is ours) and takes its lock. Raises RunDirInUse if another supervisor
        holds it, LauncherError if it cannot be made."""
        self.path = path.absolute()
        self.run_id = secrets.token_hex(6)
        self.control_socket = self.path / "control.sock"
        self.guards_socket = self.path / "guards.sock"
        self.listener_socket = self.path / "listen.sock"
        self.commands_socket = self.path / "commands.sock"
        if len(os.fsencode(self.control_socket)) > _MAX_SOCKET_PATH:
            raise LauncherError(f"--run-dir {self.path}: too long for a socket; give a shorter path")
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with contextlib.suppress(PermissionError):  # a volume's own folder, which is its owner's to open
                self.path.chmod(0o700)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LauncherError(f"--run-dir {self.path}: {error.strerror}; give another folder") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            recorded = self.read_json("processes.json").get("supervisor")
            owner = ProcessId(**recorded) if recorded else None
            raise RunDirInUse(
                f"--run-dir {self.path}: in use by the supervisor with pid {owner.pid if owner else 'unknown'}; "
                "stop it or give another folder",
                owner,
            ) from None
        self._record: dict[str, Any] = {}

    def close(self) -> None:
        """Gives up the lock; the folder stays, with its logs."""
        for path in (*self.path.glob("control*.sock"), self.guards_socket, self.commands_socket):
            with contextlib.suppress(OSError):
                path.unlink()
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
        twice. Raises OSError."""
        epoch = self.epoch + 1
        temporary = self.path / "epoch.new"
        content = f"{epoch}\n".encode()
        try:
            _write_synced(temporary, content, os.O_CREAT | os.O_TRUNC)
            temporary.rename(self.path / "epoch")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or epoch == 1:
                raise
            # The file that is there has its block already. It never gets shorter, and so few bytes are written whole.
            _write_synced(self.path / "epoch", content)
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
        remove_shared_memory(self.shm_dir(epoch))
        shutil.rmtree(self.world_dir(epoch) / "tmp", ignore_errors=True)

    # ----------------------------------------------------------------- who runs

    def processes_of(self, epoch: int) -> set[ProcessId]:
        """All of a world on this host, by their environment."""
        return {process for process, of in _processes_of_run(self.run_id, ()) if of == str(epoch)}

    def record(self, **processes: ProcessId | None) -> None:
        """Writes down who runs, by pid and start time, for people and for the next supervisor."""
        self._record["run_id"] = self.run_id
        for name, process in processes.items():
            self._record[name] = None if process is None else {"pid": process.pid, "start": process.start}
        self.write_json("processes.json", self._record)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Puts a file of this folder in place whole, for its owner alone."""
        temporary = self.path / f"{name}.new"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w") as file:
            file.write(json.dumps(content) + "\n")
        temporary.rename(self.path / name)

    def read_json(self, name: str) -> dict[str, Any]:
        """What `write_json` put there; empty if it is missing or broken."""
        try:
            content = json.loads((self.path / name).read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def write_address(self, url: str) -> None:
        """Leaves the HTTP address for `phalanx status`."""
        with contextlib.suppress(OSError):  # a full disk: then it is to be given with --url
            (self.path / ADDRESS_FILE).write_text(url + "\n")

    def forget(self) -> None:
        """Removes the records: nothing runs any more."""
        records = [self.path / name for name in ("processes.json", "deployment.json", ADDRESS_FILE)]
        sockets = [path for name in ("listen", "peer", "zmq") for path in self.path.glob(f"{name}*.sock")]
        for path in (*records, *sockets, *self.path.glob("counts-*.shared")):
            with contextlib.suppress(OSError):
                path.unlink()

    def remove_leftovers(
        self, timeout_s: float = 5.0, keep_epochs: Collection[int] = (), keep_pids: Collection[int] = ()
    ) -> list[int]:
        """Ends what an earlier supervisor, killed in mid-run, left behind in this folder, and removes its
        shared memory; except for the worlds of `keep_epochs` and the fronts `keep_pids`, which are taken over.
        Returns the pids ended. Raises LauncherError if some outlive `timeout_s`."""
        run_id = self.read_json("processes.json").get("run_id")
        if not isinstance(run_id, str) or not run_id.isalnum():
            return []
        keep = {str(epoch) for epoch in keep_epochs}
        ended: list[int] = []
        give_up_at = time.monotonic() + timeout_s
        while left := [
            process for process, epoch in _processes_of_run(run_id, keep_pids) if epoch not in keep
        ]:
            if time.monotonic() > give_up_at:
                pids = ", ".join(str(process.pid) for process in left)
                raise LauncherError(
                    f"processes of an earlier run do not end: {pids}; end them, then try again"
                )
            ended += [process.pid for process in left if kill(process) and process.pid not in ended]
            time.sleep(0.02)
        for folder in {self.shm_dir(0).parent, Path("/dev/shm")}:
            for leftover in folder.glob(f"phalanx-{run_id}-*"):
                if leftover.name.rpartition("-")[2] not in keep:
                    remove_shared_memory(leftover)
        for temporary in (self.path / "worlds").glob("*/tmp"):
            if temporary.parent.name not in keep:
                shutil.rmtree(temporary, ignore_errors=True)
        if not keep and not keep_pids:
            self.forget()
        return ended


def _processes_of_run(run_id: str, keep_pids: Collection[int]) -> list[tuple[ProcessId, str]]:
    """The living ones but `keep_pids`, each with the epoch of its world; without one, an empty string."""
    found = []
    for stat in all_processes():
        if stat.state in "ZX" or stat.pid in keep_pids:
            continue
        variables = environment_of(stat.pid)
        if variables.get(RUN_ID_VARIABLE) == run_id:
            found.append((ProcessId(stat.pid, stat.start), variables.get(EPOCH_VARIABLE, "")))
    return found


def _write_synced(path: Path, content: bytes, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags, 0o644)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
