"""The guard: parent of one rank, started by mpirun. It reaps its rank, sees it stopped, beats to the
supervisor and kills the rank on order. It must never outlive supervisor or mpirun, nor leave its rank behind.

    python -m launcher.guard --epoch N -- COMMAND...
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import zmq

from launcher.processes import ProcessId, StateReader, host_id, host_name, is_alive
from launcher.watch import (
    PARENT_VARIABLE,
    PROGRESS_PAGE_VARIABLE,
    Beat,
    FaultReport,
    GuardHello,
    Kill,
    Killed,
    Message,
    MessageError,
    Phase,
    Progress,
    ProgressPage,
    from_bytes,
)

BEAT_INTERVAL_S = 0.05
STARTING_INTERVAL_S = 0.01
"""A rank that starts is looked at more often: everybody waits for it. At rest each look costs 0.2 ms."""
FROZEN_AFTER_S = 0.45
"""A rank stopped for less goes on as if nothing had been (a debugger, a checkpoint, a busy cgroup)."""
ORDER_WAIT_S = 5.0
"""How long a guard whose rank has ended waits for the supervisor's order before it ends by itself."""
LAST_LINES_BYTES = 4096

_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")


@dataclass(frozen=True)
class GuardEnvironment:
    """What the supervisor hands to every guard of a world, through the environment: keys never stand on a
    command line, and the guard takes them out of what its rank inherits."""

    endpoint: str
    """Where the supervisor's ROUTER listens."""
    server_key: str
    public_key: str
    secret_key: str
    """CURVE keys, Z85: the supervisor's public one, and the pair of this run's guards."""
    supervisor: ProcessId
    supervisor_host_id: str
    world_dir: Path
    """For the ranks' output."""
    shm_dir: Path
    """The world's shared-memory folder."""

    _PREFIX = "PHALANX_GUARD_"

    def to_environment(self) -> dict[str, str]:
        """The variables; from_environment is the inverse."""
        prefix = self._PREFIX
        return {
            f"{prefix}ENDPOINT": self.endpoint,
            f"{prefix}SERVER_KEY": self.server_key,
            f"{prefix}PUBLIC_KEY": self.public_key,
            f"{prefix}SECRET_KEY": self.secret_key,
            f"{prefix}SUPERVISOR": f"{self.supervisor.pid} {self.supervisor.start} {self.supervisor_host_id}",
            f"{prefix}WORLD_DIR": str(self.world_dir),
            f"{prefix}SHM_DIR": str(self.shm_dir),
        }

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> GuardEnvironment:
        """Raises KeyError or ValueError for what is missing or malformed."""
        prefix = cls._PREFIX
        pid, start, supervisor_host_id = environment[f"{prefix}SUPERVISOR"].split(" ", 2)
        return cls(
            endpoint=environment[f"{prefix}ENDPOINT"],
            server_key=environment[f"{prefix}SERVER_KEY"],
            public_key=environment[f"{prefix}PUBLIC_KEY"],
            secret_key=environment[f"{prefix}SECRET_KEY"],
            supervisor=ProcessId(int(pid), int(start)),
            supervisor_host_id=supervisor_host_id,
            world_dir=Path(environment[f"{prefix}WORLD_DIR"]),
            shm_dir=Path(environment[f"{prefix}SHM_DIR"]),
        )


def rank_of_environment(environment: Mapping[str, str]) -> int:
    """The rank that the MPI launcher gave this process; 0 without one."""
    for variable in _RANK_VARIABLES:
        if variable in environment:
            return int(environment[variable])
    return 0


class Guard:
    """Watches one rank from its start to its end. `run` returns the guard's exit code."""

    def __init__(self, epoch: int, rank: int, environment: GuardEnvironment, command: Sequence[str]) -> None:
        self.epoch = epoch
        self.rank = rank
        self._environment = environment
        self._command = list(command)
        self._log_path = environment.world_dir / f"rank-{rank}.log"
        self._mpirun = os.getppid()
        self._stopped_since: float | None = None
        self._reported = False
        self._ended_at: float | None = None
        self._exit_code: int | None = None
        self._told_to_end = False
        self._interval_s = STARTING_INTERVAL_S
        self._last_beat = 0.0
        self._last_view: tuple[Phase, str | None] | None = None

    def run(self) -> int:
        """Spawns the rank and watches it until it is dead and the supervisor knows, or nobody is left to
        tell."""
        self._catch_signals()
        self._environment.world_dir.mkdir(parents=True, exist_ok=True)
        self._environment.shm_dir.mkdir(mode=0o700, exist_ok=True)
        page_path = self._environment.shm_dir / f"rank-{self.rank}.progress"
        self._page = ProgressPage.create(page_path)
        self._process = self._spawn(page_path)
        self._state = StateReader(self._process.pid)
        try:
            with zmq.Context() as context, self._connect(context) as link:
                self._link = link
                return self._watch()
        finally:
            self._kill_rank()

    def _catch_signals(self) -> None:
        # mpirun ends its processes by SIGTERM; the pair of sockets wakes the poll when one comes in.
        self._wake, write_end = socket.socketpair()
        self._wake.setblocking(False)
        write_end.setblocking(False)
        self._write_end = write_end
        signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self._told_to_end = True

    def _spawn(self, page_path: Path) -> subprocess.Popen[bytes]:
        variables = {
            name: value for name, value in os.environ.items() if not name.startswith(GuardEnvironment._PREFIX)
        }
        variables[PROGRESS_PAGE_VARIABLE] = str(page_path)
        variables[PARENT_VARIABLE] = str(os.getpid())
        variables["PYTHONUNBUFFERED"] = "1"
        variables["PYTHONFAULTHANDLER"] = "1"  # a segmentation fault leaves a trace for the post-mortem
        with self._log_path.open("ab") as log:
            # MPICH's launcher hands the rank an open file descriptor, which has to reach it.
            return subprocess.Popen(
                self._command,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                close_fds=False,
            )

    def _connect(self, context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
        link = context.socket(zmq.DEALER)
        link.curve_serverkey = self._environment.server_key.encode()
        link.curve_publickey = self._environment.public_key.encode()
        link.curve_secretkey = self._environment.secret_key.encode()
        link.linger = 500  # ms: time for the last word to leave
        link.sndhwm = 256
        link.set(zmq.RECONNECT_IVL, 20)
        link.connect(self._environment.endpoint)
        return link

    def _watch(self) -> int:
        rank_id = ProcessId.of(self._process.pid)
        own_id = ProcessId.of(os.getpid())
        assert rank_id is not None and own_id is not None  # neither is reaped yet
        self._send(
            GuardHello(
                epoch=self.epoch,
                rank=self.rank,
                host=host_name(),
                host_id=host_id(),
                guard_pid=own_id.pid,
                guard_start=own_id.start,
                pid=rank_id.pid,
                start=rank_id.start,
            )
        )
        rank_descriptor = os.pidfd_open(self._process.pid)
        poller = zmq.Poller()
        poller.register(self._link, zmq.POLLIN)
        poller.register(rank_descriptor, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        supervisor_descriptor = self._open_supervisor()
        if supervisor_descriptor is not None:
            poller.register(supervisor_descriptor, select.POLLIN)
        checked_at = time.monotonic()
        while True:
            events = dict(poller.poll(round(self._interval_s * 1000)))
            now = time.monotonic()
            if self._wake.fileno() in events:
                with contextlib.suppress(BlockingIOError):
                    self._wake.recv(64)
            if rank_descriptor in events:
                poller.unregister(rank_descriptor)
                os.close(rank_descriptor)
                self._on_rank_end(now - checked_at)
            if self._told_to_end or (self._link in events and self._ordered_to_kill()):
                self._kill_rank()
                self._send(Killed(epoch=self.epoch, rank=self.rank))
                return self._end_code()
            if supervisor_descriptor in events or os.getppid() != self._mpirun:
                self._kill_rank()
                # The supervisor will not tidy up any more, or is about to do the same.
                shutil.rmtree(self._environment.shm_dir, ignore_errors=True)
                return self._end_code()
            if self._ended_at is not None and now - self._ended_at > ORDER_WAIT_S:
                return self._end_code()
            late_s = max(0.0, now - checked_at - self._interval_s)
            checked_at = now
            self._check_state(now, late_s)

    def _open_supervisor(self) -> int | None:
        """A descriptor that tells of the supervisor's end; None where it runs on another host. If it has
        ended already, the guard is told to end."""
        if self._environment.supervisor_host_id != host_id():
            return None
        try:
            descriptor = os.pidfd_open(self._environment.supervisor.pid)
        except OSError:
            self._told_to_end = True
            return None
        if not is_alive(self._environment.supervisor):  # its pid means another process by now
            self._told_to_end = True
        return descriptor

    def _on_rank_end(self, since_check_s: float) -> None:
        self._exit_code = code = self._process.wait()
        self._ended_at = time.monotonic()
        if self._reported:
            return
        doing = describe_progress(self._page.read())
        if code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:
                name = f"signal {-code}"
            kind, detail = "killed", f"rank {self.rank} was killed by {name} while {doing}"
        else:
            kind, detail = "exit", f"rank {self.rank} exited with code {code} while {doing}"
        self._report(kind, detail, code, since_check_s)

    def _check_state(self, now: float, late_s: float) -> None:
        """Beats, and reports a rank that has been stopped for too long."""
        state = self._state.read()
        if state not in "Tt":
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = now
        else:
            self._stopped_since += late_s  # it may have run while this guard did not
            stopped_s = now - self._stopped_since
            if stopped_s > FROZEN_AFTER_S and not self._reported:
                doing = describe_progress(self._page.read())
                detail = f"rank {self.rank} has been stopped for {stopped_s:.2f} s while {doing}"
                self._report("frozen", detail, None, stopped_s)
        progress = self._page.read()
        view = (progress.phase, progress.endpoint)
        if now - self._last_beat >= 0.9 * BEAT_INTERVAL_S or view != self._last_view:
            self._last_beat = now
            serving = progress.phase in (Phase.IDLE, Phase.STEPPING)
            self._interval_s = BEAT_INTERVAL_S if serving else STARTING_INTERVAL_S
            self._last_view = view
            self._send(
                Beat(
                    epoch=self.epoch,
                    rank=self.rank,
                    state=state,
                    phase=int(progress.phase),
                    step=progress.step,
                    collective=progress.collective,
                    age_s=progress.age_s,
                    load_done=progress.load_done,
                    load_total=progress.load_total,
                    endpoint=progress.endpoint,
                )
            )

    def _report(self, kind: str, detail: str, exit_code: int | None, detect_s: float) -> None:
        self._reported = True
        self._send(
            FaultReport(
                epoch=self.epoch,
                rank=self.rank,
                kind=kind,
                exit_code=exit_code,
                detail=detail,
                detect_s=detect_s,
                last_lines=last_lines(self._log_path),
            )
        )

    def _ordered_to_kill(self) -> bool:
        while True:
            try:
                message = from_bytes(self._link.recv(zmq.NOBLOCK))
            except zmq.Again:
                return False
            except MessageError:
                continue
            if isinstance(message, Kill) and message.epoch >= self.epoch:
                return True

    def _kill_rank(self) -> None:
        if self._exit_code is None:
            self._process.kill()
            # Only a process in an uninterruptible wait outlives this; the supervisor sees that it does.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._exit_code = self._process.wait(timeout=ORDER_WAIT_S)

    def _end_code(self) -> int:
        """The rank's own code where it had one; an end that nobody planned is never 0."""
        return self._exit_code if self._exit_code is not None and self._exit_code > 0 else 1

    def _send(self, message: Message) -> None:
        # A supervisor that does not read finds old beats worthless later on.
        with contextlib.suppress(zmq.Again):
            self._link.send(message.to_bytes(), zmq.NOBLOCK)


def describe_progress(progress: Progress) -> str:
    """What a rank is doing, as the end of a sentence after "while"."""
    if progress.phase is Phase.STEPPING:
        return f"in step {progress.step}, after {progress.collective} collectives"
    if progress.phase is Phase.LOADING:
        return f"loading ({progress.load_done / 1e6:.0f} of {progress.load_total / 1e6:.0f} MB)"
    return progress.phase.name.lower()


def last_lines(path: Path) -> str:
    """The end of a file of output, at most 4 KiB, beginning with a whole line; empty if there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LAST_LINES_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    if size > LAST_LINES_BYTES and "\n" in text:
        text = text.split("\n", 1)[1]
    return text.strip("\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launcher.guard", description="Parent of one rank of a world.")
    parser.add_argument("--epoch", type=int, required=True, help="number of the world that the rank is of")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command of the rank")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command: put `-- COMMAND...` at the end")
    try:
        environment = GuardEnvironment.from_environment(os.environ)
    except (KeyError, ValueError) as error:
        parser.error(f"started without the supervisor's environment ({error})")
    return Guard(options.epoch, rank_of_environment(os.environ), environment, command).run()


if __name__ == "__main__":
    sys.exit(main())
