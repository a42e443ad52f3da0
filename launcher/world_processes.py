"""The processes of one world on this host: mpirun, what of MPI stands between it and the guards, guards and ranks.
Owned by the world, which says when they are to end. Must find each of them, whatever session it is in, and name none
that is not of this world."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence

from launcher.freezer import CgroupFreezer
from launcher.processes import (
    AdoptedProcess,
    ProcessId,
    all_processes,
    ancestors,
    children,
    host_id,
    kill,
    reap_orphan,
)
from launcher.run_dir import RunDir
from launcher.world_records import RankWatch, WorldPlan


class WorldProcesses:
    """See the module's first lines. No method waits."""

    def __init__(
        self, epoch: int, plan: WorldPlan, run_dir: RunDir, ranks: Mapping[int, RankWatch], on_hosts: int
    ) -> None:
        """`ranks`: of the world, which adds those that report. `on_hosts`: how many hosts they are on, or 0."""
        self.mpirun: ProcessId | None = None
        """Once started; or what stands for it, as srun."""
        self.mpirun_log = run_dir.world_dir(epoch) / "mpirun.log"
        self._epoch = epoch
        self._plan = plan
        self._run_dir = run_dir
        self._ranks = ranks
        self._on_hosts = on_hosts
        self._command: subprocess.Popen[bytes] | AdoptedProcess | None = None
        """Mpirun, as something to be polled and signalled."""
        self._command_ended_at: float | None = None
        """When it was told to end."""
        self._proxies: set[ProcessId] = set()
        """What of MPI stands between mpirun and the guards, in sessions of its own: Hydra's proxy, and its shells."""
        self._unreported: set[ProcessId] = set()

    def start(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts mpirun in a session of its own, its output in its log. Raises OSError."""
        with self.mpirun_log.open("ab") as log:
            self._command = subprocess.Popen(
                argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.mpirun = ProcessId.of(self._command.pid)

    def adopt(self, mpirun: ProcessId) -> None:
        """What an earlier supervisor started. Raises ProcessLookupError if it is gone."""
        self._command = AdoptedProcess(mpirun)
        self.mpirun = mpirun

    @property
    def mpirun_end(self) -> str | None:
        """How mpirun ended, for people; None while it runs, and before it was started."""
        code = self._command.poll() if self._command is not None else None
        return None if code is None else f"{self._plan.launcher.program} {_describe_exit(code)}"

    def note_guard(self, watch: RankWatch) -> None:
        """A guard has reported: what is above it is of this world, too."""
        if self._command is None:
            return
        if not watch.is_remote:
            self._proxies |= ancestors(watch.guard, {self._command.pid, os.getpid()})
        if len(self._ranks) == self._plan.size:
            self.note_shells()

    def note_shells(self) -> None:
        """What connects to the other hosts: under Hydra in sessions of their own, and without an end where a host
        is dead and says nothing any more. To be called while mpirun is their parent."""
        if not self._plan.launcher.has_ranks_in_session or self._on_hosts < 2:
            return
        if self._command is not None and self._command.returncode is None:
            self._proxies |= children(self._command.pid)

    def end_mpirun(self, now: float) -> bool:
        """Asks mpirun, or what stands for it, to end. True while that has time left for it."""
        launcher = self._plan.launcher
        if self._command is None or self._command.returncode is not None:
            return False
        if self._command_ended_at is None:
            self._command_ended_at = now
            self._command.send_signal(launcher.end_signal)
        return now - self._command_ended_at < launcher.end_grace_s

    def end_rest(self, now: float) -> bool:
        """Kills what is left, but for mpirun and its like while those have time to end by themselves. True once
        nothing is left."""
        if self._command is not None:
            self._command.poll()
        left = self.left()
        if left:
            spared = set(left) - self._known_here() if self.end_mpirun(now) else set()
            for process in set(left) - spared:
                kill(process)
            pids = {process.pid for process in left}
            for pid in pids:
                CgroupFreezer(pid).thaw(pids)  # else it would not die
        return not left

    def left(self) -> list[ProcessId]:
        """All of mpirun's session, and what its guards named, zombies included. Reaps those that the supervisor has
        adopted."""
        if self._command is None:
            return []
        if len(self._ranks) < self._plan.size:
            # A rank has a session of its own, and its guard may have died before it could name it.
            self._unreported |= self._run_dir.processes_of(self._epoch)
        known = self._known_here() | self._proxies | self._unreported
        left = []
        for stat in all_processes():
            process = ProcessId(stat.pid, stat.start)
            if stat.session != self._command.pid and process not in known:
                continue
            if stat.state in "ZX":
                if isinstance(self._command, AdoptedProcess) and stat.threads <= 1:
                    continue  # a child of others, who may never reap it; it holds nothing any more
                if stat.pid != self._command.pid:
                    reap_orphan(stat.pid)
            left.append(process)
        return left

    def _known_here(self) -> set[ProcessId]:
        """Guards and ranks of this host that have reported."""
        here = host_id()
        return {
            process
            for watch in self._ranks.values()
            if watch.hello.host_id == here
            for process in (watch.guard, watch.process)
        }


def _describe_exit(code: int) -> str:
    if code == AdoptedProcess.UNKNOWN_CODE:
        return "ended"
    return f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
