"""The guard: parent of one rank, started by mpirun. It reaps its rank, sees it stopped, beats to the
supervisor and kills the rank on order. It must never outlive mpirun, nor its wait for a supervisor that takes over
from one that ended, nor leave its rank behind.

    python -m launcher.guard --epoch N [--spare warm|hot] -- COMMAND...
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence

import zmq

from launcher.binding import BINDINGS
from launcher.end_signals import EndSignals
from launcher.freezes import FreezeWatch
from launcher.guard_environment import GuardEnvironment, connect, rank_of_environment
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
    from_bytes,
)
from launcher.hangs import HangWatch
from launcher.host_report import HostReport, RankReport
from launcher.laggards import EXCUSED_TIMES, Laggards
from launcher.life_lock import LifeLock
from launcher.post_mortem import (
    describe_progress,
    dump_stacks,
    last_lines,
    python_stacks,
    signal_name,
)
from launcher.processes import ProcessId, ending_code, host_id, host_name
from launcher.rank_memory import RankMemory
from launcher.rank_start import StartGate, start_rank
from launcher.segments import SegmentWatch, remove_shared_memory
from launcher.starvation import Starvation
from launcher.supervisor_tie import SupervisorTie
from launcher.watch import (
    LIFE_SUFFIX,
    Phase,
    Progress,
    ProgressPage,
    SpareKind,
)

BEAT_INTERVAL_S = 0.05
STARTING_INTERVAL_S = 0.01
"""A rank that starts is looked at more often: everybody waits for it. At rest each look costs 0.2 ms."""
PARKED_INTERVAL_S = 0.25
"""Nobody waits for the rank of a spare; its end wakes the guard at once all the same."""
ORDER_WAIT_S = 5.0
"""How long a guard whose rank has ended waits for the supervisor's order before it ends by itself."""


_ADOPTABLE = (Phase.IDLE, Phase.STEPPING, Phase.PARKED)
"""No supervisor takes over a world that is still on its way."""


class Guard:
    """Watches one rank from its start to its end. `run` returns the guard's exit code."""

    def __init__(
        self,
        epoch: int,
        rank: int,
        environment: GuardEnvironment,
        command: Sequence[str],
        spare: SpareKind = SpareKind.NONE,
        binding: str = "none",
    ) -> None:
        """`spare`: where the rank parks until the supervisor says go. `binding`: see launcher.binding."""
        self._host = HostReport(binding)
        self.epoch = epoch
        self.rank = rank
        self._environment = environment
        self._command = list(command)
        self._log_path = environment.world_dir / f"rank-{rank}.log"
        self._stack_path = environment.world_dir / f"rank-{rank}.stacks"
        self._mpirun = os.getppid()
        self._report: FaultReport | None = None
        """What was reported of the rank's fault, once it was."""
        self._life: LifeLock | None = None
        """Until somebody waits for it."""
        self._rank_is_ending = False
        self._ended_at: float | None = None
        self._exit_code: int | None = None
        self._spare = spare
        self._gate = StartGate()
        self._hangs = HangWatch()
        self._laggards = Laggards(self._environment.shm_dir, self.rank)
        self._starvation = Starvation(environment.shm_dir)
        self._interval_s = STARTING_INTERVAL_S
        self._last_beat = 0.0
        self._last_view: tuple[Phase, str | None] | None = None
        self._tie: SupervisorTie | None = None

    def run(self) -> int:
        """Spawns the rank and watches it until it is dead and the supervisor knows, or nobody is left to
        tell."""
        self._signals = EndSignals()
        self._environment.shm_dir.mkdir(mode=0o700, exist_ok=True)
        self._place_logs()
        page_path = self._environment.shm_dir / f"rank-{self.rank}.progress"
        self._page = ProgressPage.create(page_path)
        if self._environment.supervisor_host_id != host_id():
            self._page.lend(time.monotonic() + self._environment.adoption_wait_s)
        has_other_hosts = bool(self._environment.remote_endpoint)
        self._facts = RankReport(self.epoch, self.rank, page_path, has_other_hosts)
        self._life = LifeLock.create(page_path.with_suffix(LIFE_SUFFIX))
        self._process = start_rank(
            self._command,
            page_path,
            self._log_path,
            self._stack_path,
            self._spare,
            self._gate,
            self._host.bound_to,
        )
        rank_id = ProcessId.of(self._process.pid)
        assert rank_id is not None  # it is not reaped yet
        self._rank_id = rank_id
        self._starvation.tell_pid(self.rank, self._process.pid)
        self._freezes = FreezeWatch(self._process.pid)
        self._memory = RankMemory(self._process.pid)
        self._segments = SegmentWatch(self._environment.shm_dir, self.rank, self._process.pid)
        try:
            with zmq.Context() as context, connect(self._environment, context) as link:
                self._link = link
                return self._watch(link)
        finally:
            self._kill_rank()
            self._tidy_up()

    def _place_logs(self) -> None:
        """Into the run folder; on another host that cannot have it, as a pod with a read-only root, beside the shared
        memory, where they last as long as the world."""
        try:
            self._environment.world_dir.mkdir(parents=True, exist_ok=True)
        except OSError:
            if self._environment.supervisor_host_id == host_id():
                raise
            self._log_path = self._environment.shm_dir / self._log_path.name
            self._stack_path = self._environment.shm_dir / self._stack_path.name

    def _watch(self, link: zmq.Socket[bytes]) -> int:
        rank_descriptor = os.pidfd_open(self._process.pid)
        poller = zmq.Poller()
        poller.register(self._link, zmq.POLLIN)
        poller.register(rank_descriptor, select.POLLIN)
        poller.register(self._signals.fileno(), select.POLLIN)
        tie = self._tie = SupervisorTie(self._environment, link, poller, time.monotonic())
        if tie.is_lost:  # no other supervisor takes over a world that is only starting
            self._signals.told_to_end = True
        greeted = False
        checked_at = time.monotonic()
        while True:
            greeted = greeted or self._say_hello()
            planned_s = max(0.0, min(self._interval_s, tie.left_s(time.monotonic())))
            events = dict(poller.poll(round(planned_s * 1000)))
            now = time.monotonic()
            if self._signals.fileno() in events:
                self._signals.drain()
            if self._rank_is_ending and self._report is None:
                self._on_rank_ending(now - checked_at)
            if rank_descriptor in events:
                poller.unregister(rank_descriptor)
                os.close(rank_descriptor)
                self._on_rank_end(now - checked_at)
            if tie.check(events, now) and self._page.read().phase not in _ADOPTABLE:
                self._signals.told_to_end = True
            if self._signals.told_to_end or (self._link in events and self._hear_orders()):
                self._kill_rank()
                self._send(Killed(epoch=self.epoch, rank=self.rank))
                return self._end_code()
            if tie.left_s(now) <= 0 or os.getppid() != self._mpirun:
                self._kill_rank()
                return self._end_code()
            if self._ended_at is not None and now - self._ended_at > ORDER_WAIT_S:
                return self._end_code()
            if tie.is_remote:
                self._page.lend(now + tie.left_s(now))
            late_s = max(0.0, now - checked_at - planned_s)
            checked_at = now
            self._check_state(now, late_s)

    def _say_hello(self) -> bool:
        """Who this guard is, and what it has reported already; False if nobody is connected yet."""
        own_id = ProcessId.of(os.getpid())
        assert own_id is not None
        hello = GuardHello(
            epoch=self.epoch,
            rank=self.rank,
            host=host_name(),
            host_id=host_id(),
            guard_pid=own_id.pid,
            guard_start=own_id.start,
            pid=self._rank_id.pid,
            start=self._rank_id.start,
            **self._host.read(self._environment.shm_dir),
        )
        return self._send(hello) and (self._report is None or self._send(self._report))

    def _watch_life(self) -> None:
        if self._life is None or not self._life.is_held:
            return

        def on_end() -> None:  # in another thread
            self._rank_is_ending = True
            self._signals.wake()

        self._life.watch(on_end)
        self._life = None

    def _on_rank_ending(self, since_check_s: float) -> None:
        """It cannot run any more, and can be waited for only when its memory is given back."""
        if (code := ending_code(self._process.pid)) is not None:
            self._tell_end(code, since_check_s)

    def _on_rank_end(self, since_check_s: float) -> None:
        self._exit_code = code = self._process.wait()
        self._ended_at = time.monotonic()
        if self._report is None:
            self._tell_end(code, since_check_s)

    def _tell_end(self, code: int, since_check_s: float) -> None:
        doing = describe_progress(self._page.read())
        if code < 0:
            kind, detail = "killed", f"rank {self.rank} was killed by {signal_name(code)} while {doing}"
        else:
            kind, detail = "exit", f"rank {self.rank} exited with code {code} while {doing}"
        self._tell_fault(kind, detail, code, since_check_s)

    def _check_state(self, now: float, late_s: float) -> None:
        """Beats, and reports a rank that has been stopped or silent for too long."""
        self._watch_life()
        stopped_s = self._freezes.check(now, late_s)
        if stopped_s is not None and self._report is None:
            doing = describe_progress(self._page.read())
            detail = f"rank {self.rank} has been {self._freezes.how} for {stopped_s:.2f} s while {doing}"
            self._tell_fault("frozen", detail, None, stopped_s)
        progress = self._page.read()
        silence_s = progress.age_s if progress.phase is Phase.STEPPING else 0.0
        starved_s = self._starvation.new_wait_s(silence_s, now, late_s)
        hung_s = self._hangs.check(progress, now, late_s, starved_s)
        if hung_s is not None and self._report is None:
            self._judge_silence(progress, hung_s)
        parked = progress.phase is Phase.PARKED and self._gate.is_shut
        if self._memory.check(parked, now) or progress.phase in (Phase.JOINING, Phase.LOADING):
            self._segments.look(progress.phase)
        self._tell_facts()
        view = (progress.phase, progress.endpoint)
        if now - self._last_beat >= 0.9 * BEAT_INTERVAL_S or view != self._last_view:
            self._last_beat = now
            if parked:
                self._interval_s = PARKED_INTERVAL_S
            elif progress.phase in (Phase.IDLE, Phase.STEPPING):
                self._interval_s = BEAT_INTERVAL_S
            else:
                self._interval_s = STARTING_INTERVAL_S
            self._last_view = view
            self._send(
                Beat(
                    epoch=self.epoch,
                    rank=self.rank,
                    state=self._freezes.state,
                    phase=int(progress.phase),
                    step=progress.step,
                    collective=progress.collective,
                    age_s=progress.age_s,
                    load_done=progress.load_done,
                    load_total=progress.load_total,
                    endpoint=progress.endpoint,
                    kv_blocks=progress.kv_blocks,
                    memory_bytes=self._memory.num_bytes,
                    sent_s=now,
                    delay_s=self._tie.delay_s if self._tie is not None else 0.0,
                )
            )

    def _judge_silence(self, progress: Progress, silent_s: float) -> None:
        limit_s = self._hangs.limit_s(progress.num_tokens)
        if silent_s <= EXCUSED_TIMES * limit_s and self._laggards.behind(progress) is not None:
            return  # it waits for one that its own guard judges
        detail = (
            f"rank {self.rank} has made no progress for {silent_s:.2f} s while {describe_progress(progress)}"
        )
        detail += f"; {limit_s:.1f} s were allowed"
        if self._hangs.starved_s > 0.1:
            detail += f", and {self._hangs.starved_s:.1f} s more without a processor"
        self._tell_fault("hung", detail, None, silent_s)

    def _tell_facts(self) -> None:
        if (facts := self._facts.read_new()) is not None:
            self._send(facts)

    def _tell_fault(self, kind: str, detail: str, exit_code: int | None, detect_s: float) -> None:
        self._tell_facts()  # they may say why
        progress = self._page.read()
        stacks = python_stacks(self._log_path)
        if kind == "hung":
            stacks = dump_stacks(self._process.pid, self._stack_path)
        self._report = FaultReport(
            epoch=self.epoch,
            rank=self.rank,
            kind=kind,
            exit_code=exit_code,
            detail=detail,
            detect_s=detect_s,
            last_lines=last_lines(self._log_path),
            phase=int(progress.phase),
            step=progress.step,
            collective=progress.collective,
            age_s=progress.age_s,
            stacks=stacks,
        )
        self._send(self._report)

    def _hear_orders(self) -> bool:
        """Answers a new supervisor, and lets the rank of a spare go when told to; True if the rank is to be
        killed."""
        while True:
            try:
                message = from_bytes(self._link.recv(zmq.NOBLOCK))
            except zmq.Again:
                return False
            except MessageError:
                continue
            if isinstance(message, Kill) and message.epoch >= self.epoch:
                return True
            if isinstance(message, (Introduce, Lease)) and self._tie is not None:
                self._tie.on_message(message, max(BEAT_INTERVAL_S, self._interval_s), time.monotonic())
                if isinstance(message, Introduce):
                    self._say_hello()
            elif isinstance(message, Go) and message.epoch == self.epoch and self._gate.is_shut:
                self._gate.open()
                self._interval_s = STARTING_INTERVAL_S

    def _kill_rank(self) -> None:
        if self._exit_code is None:
            if self._page.read().phase in (Phase.JOINING, Phase.LOADING):
                self._segments.note()
            self._process.kill()
            # Only a process in an uninterruptible wait outlives this; the supervisor sees that it does.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._exit_code = self._process.wait(timeout=ORDER_WAIT_S)

    def _tidy_up(self) -> None:
        """Removes the world's shared memory where no supervisor will: it has ended, or runs on another host."""
        tie = self._tie
        if os.getppid() != self._mpirun or tie is None or tie.is_waiting or tie.is_remote:
            remove_shared_memory(self._environment.shm_dir)

    def _end_code(self) -> int:
        """The rank's own code where it had one; an end that nobody planned is never 0."""
        return self._exit_code if self._exit_code is not None and self._exit_code > 0 else 1

    def _send(self, message: Message) -> bool:
        # A supervisor that does not read finds old beats worthless later on.
        try:
            self._link.send(message.to_bytes(), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launcher.guard", description="Parent of one rank of a world.")
    parser.add_argument("--epoch", type=int, required=True, help="number of the world that the rank is of")
    parser.add_argument(
        "--spare",
        type=SpareKind,
        default=SpareKind.NONE,
        help="none, warm or hot: where the rank parks until the supervisor says go",
    )
    parser.add_argument("--bind", choices=BINDINGS, default="none", help="cores that the rank gets")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command of the rank")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command: put `-- COMMAND...` at the end")
    try:
        environment = GuardEnvironment.from_environment(os.environ)
    except (KeyError, ValueError) as error:
        parser.error(f"started without the supervisor's environment ({error})")
    rank = rank_of_environment(os.environ)
    return Guard(options.epoch, rank, environment, command, options.spare, options.bind).run()


if __name__ == "__main__":
    sys.exit(main())
