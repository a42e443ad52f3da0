"""A real guard process with a real child, over the real link."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import zmq

from launcher.guard_link import GuardLink
from launcher.guard_messages import Beat, FaultReport, Go, GuardHello, Kill, Killed, Lease, Message
from launcher.leases import LEASE_S
from launcher.processes import ProcessId, is_alive
from launcher.watch import Phase, ProgressPage
from tests.cgroups import frozen_cgroup

EPOCH = 7
ADOPTION_WAIT_S = 1.5
RANK = """
import os, sys, time
from pathlib import Path
from launcher.watch import Phase, ProgressPage, die_with_parent
die_with_parent()
assert not [name for name in os.environ if "SECRET" in name]
page = ProgressPage.open(Path(os.environ["PHALANX_PROGRESS_PAGE"]))
page.enter(Phase.LOADING); page.load(3, 4); page.serve_at("tcp://here:1"); page.step(41)
print("the last words", file=sys.stderr)
"""
M = TypeVar("M", bound=Message)


class Watched:
    """A guard, and the supervisor's side of its link."""

    def __init__(
        self,
        tmp_path: Path,
        code: str,
        wrapper: list[str] | None = None,
        spare: str = "none",
        remote: bool = False,
    ) -> None:
        """`remote`: the guard takes the supervisor for one of another host."""
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.supervisor = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        supervisor_id = ProcessId.of(self.supervisor.pid)
        assert supervisor_id is not None
        self.link = GuardLink(self.context, supervisor_id)
        self.shm_dir = tmp_path / "shm"
        self.shm_dir.mkdir()
        self.environment = self.link.guard_environment(tmp_path / "world", self.shm_dir, ADOPTION_WAIT_S)
        if remote:
            self.environment = replace(
                self.environment, supervisor_host_id="elsewhere", remote_endpoint=self.link.endpoint
            )
        command = [*(wrapper or []), sys.executable, "-m", "launcher.guard", "--epoch", str(EPOCH)]
        command += ["--spare", spare, "--"]
        self.guard = subprocess.Popen(
            [*command, sys.executable, "-c", RANK + code],
            env={**os.environ, **self.environment.to_environment(), "OMPI_COMM_WORLD_RANK": "3"},
        )
        self.messages: list[Message] = []
        self.identity = b""
        hello = self.expect(GuardHello)
        self.hello = hello
        self.rank = ProcessId(hello.pid, hello.start)

    def expect(
        self, kind: type[M], condition: Callable[[M], bool] = lambda _: True, timeout_s: float = 10.0
    ) -> M:
        """Waits for such a message."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for message in self.messages:
                if isinstance(message, kind) and condition(message):
                    self.messages.remove(message)
                    return message
            self.link.router.poll(10)
            self.link.answer_zap()
            for identity, message in self.link.receive():
                self.identity = identity
                self.messages.append(message)
        raise AssertionError(f"no {kind.__name__} within {timeout_s} s; got {self.messages[-3:]}")

    def gone(self, timeout_s: float = 5.0) -> bool:
        """Whether the rank ends within this time."""
        deadline = time.monotonic() + timeout_s
        while is_alive(self.rank) and time.monotonic() < deadline:
            time.sleep(0.005)
        return not is_alive(self.rank)

    def close(self) -> None:
        for process in (self.supervisor, self.guard):
            if process.poll() is None:
                process.kill()
            process.wait()
        self.link.close()
        self.context.term()


Start = Callable[..., Watched]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Watched] = []

    def begin(
        code: str, wrapper: list[str] | None = None, spare: str = "none", remote: bool = False
    ) -> Watched:
        started.append(Watched(tmp_path, code, wrapper, spare, remote))
        return started[-1]

    yield begin
    for watched in started:
        watched.close()


def test_hello_and_beats(start: Start) -> None:
    watched = start("time.sleep(100)")
    assert (watched.hello.epoch, watched.hello.rank) == (EPOCH, 3)
    assert watched.hello.guard_pid == watched.guard.pid
    assert os.getsid(watched.hello.pid) == watched.hello.pid  # see launcher/rank_start.py
    beat = watched.expect(Beat, lambda beat: beat.step == 41)
    assert beat.phase == Phase.STEPPING and beat.endpoint == "tcp://here:1"
    assert (beat.load_done, beat.load_total) == (3, 4)
    began = time.monotonic()
    for _ in range(10):
        watched.expect(Beat)
    assert time.monotonic() - began < 2.0  # 0.5 s on a machine at rest


def test_kill_order(start: Start) -> None:
    watched = start("time.sleep(100)")
    watched.link.send(watched.identity, Kill(epoch=EPOCH - 1))
    watched.expect(Beat)
    time.sleep(0.1)
    assert is_alive(watched.rank), "an order of an earlier epoch was obeyed"
    watched.link.send(watched.identity, Kill(epoch=EPOCH))
    watched.expect(Killed)
    assert not is_alive(watched.rank)
    assert watched.guard.wait(5) != 0


PARK = """
from launcher.watch import StartGate
gate = StartGate.from_environment()
page.enter(Phase.PARKED)
gate.wait()
page.step(43)
time.sleep(100)
"""


@pytest.mark.parametrize("kind", ["warm", "hot"])
def test_rank_of_a_spare_waits_for_go(start: Start, kind: str) -> None:
    watched = start(PARK, spare=kind)
    beat = watched.expect(Beat, lambda beat: beat.phase == Phase.PARKED and beat.memory_bytes > 0)
    assert 1e6 < beat.memory_bytes < 1e9
    watched.link.send(watched.identity, Go(epoch=EPOCH - 1))
    watched.messages.clear()
    assert watched.expect(Beat).step == 41, "the word of another epoch was obeyed"
    watched.link.send(watched.identity, Go(epoch=EPOCH))
    watched.expect(Beat, lambda beat: beat.step == 43)
    watched.link.send(watched.identity, Kill(epoch=EPOCH))
    watched.expect(Killed)


def test_parked_rank_that_dies_is_reported_at_once(start: Start) -> None:
    watched = start(PARK, spare="warm")
    watched.expect(Beat, lambda beat: beat.phase == Phase.PARKED)
    began = time.monotonic()
    os.kill(watched.rank.pid, signal.SIGKILL)
    assert watched.expect(FaultReport).kind == "killed"
    assert time.monotonic() - began < 0.5


def test_rank_of_a_world_that_is_no_spare_does_not_wait(start: Start) -> None:
    start(PARK).expect(Beat, lambda beat: beat.step == 43)


def test_rank_that_hangs_in_a_step_is_reported(start: Start) -> None:
    steps = "\nfor step in range(42, 52): page.step(step); time.sleep(0.2)\n"
    watched = start(steps + "page.step(52, 1); page.collective(); time.sleep(100)")
    fault = watched.expect(FaultReport, timeout_s=15.0)
    assert (fault.kind, fault.exit_code) == ("hung", None)
    assert "in step 52, after 1 collectives" in fault.detail and 3.0 < fault.detect_s < 5.0


@pytest.mark.slow
def test_a_rank_that_waits_for_another_one_is_not_the_one_that_hangs(start: Start) -> None:
    steps = "\nfor step in range(42, 52): page.step(step); time.sleep(0.2)\n"
    watched = start(steps + "page.step(52, 1); page.collective(); time.sleep(100)")
    ProgressPage.create(watched.shm_dir / "rank-0.progress").step(52)
    fault = watched.expect(FaultReport, timeout_s=30.0)
    # It is found all the same, if nobody says that the other one hangs.
    assert fault.kind == "hung" and 9.0 < fault.detect_s < 12.0


@pytest.mark.parametrize(("code", "exit_code"), [("sys.exit(0)", 0), ("sys.exit(78)", 78), ("1/0", 1)])
def test_exit_is_reported(start: Start, code: str, exit_code: int) -> None:
    watched = start(code)
    fault = watched.expect(FaultReport)
    assert (fault.kind, fault.exit_code, fault.rank) == ("exit", exit_code, 3)
    assert "step 41" in fault.detail
    assert fault.last_lines.startswith("the last words")
    assert ("ZeroDivisionError" in fault.last_lines) == (code == "1/0")
    watched.link.send(watched.identity, Kill(epoch=EPOCH))
    watched.expect(Killed)
    assert watched.guard.wait(5) != 0


def test_kill_is_reported_at_once(start: Start) -> None:
    watched = start("time.sleep(100)")
    began = time.monotonic()
    os.kill(watched.rank.pid, signal.SIGKILL)
    fault = watched.expect(FaultReport)
    assert (fault.kind, fault.exit_code) == ("killed", -9)
    assert "SIGKILL" in fault.detail
    assert time.monotonic() - began < 0.5  # 5 ms on a machine at rest


def test_stopped_rank_is_frozen_and_can_be_killed(start: Start) -> None:
    watched = start("time.sleep(100)")
    os.kill(watched.rank.pid, signal.SIGSTOP)
    fault = watched.expect(FaultReport)
    assert fault.kind == "frozen" and 0.45 < fault.detect_s < 2.0
    watched.link.send(watched.identity, Kill(epoch=EPOCH))
    watched.expect(Killed)
    assert not is_alive(watched.rank)


@pytest.mark.parametrize("version", [1, 2])
def test_rank_in_a_frozen_cgroup(start: Start, version: int) -> None:
    with frozen_cgroup(version) as cgroup:
        watched = start("time.sleep(100)")
        cgroup.add(watched.rank.pid)
        began = time.monotonic()
        cgroup.set(True)
        fault = watched.expect(FaultReport)
        assert fault.kind == "frozen" and "by its cgroup" in fault.detail, fault
        assert time.monotonic() - began < 3.0  # 0.8 s on a machine at rest
        cgroup.set(False)


def test_rank_stopped_for_200_ms_is_left_alone(start: Start) -> None:
    watched = start("time.sleep(100)")
    for _ in range(3):
        os.kill(watched.rank.pid, signal.SIGSTOP)
        time.sleep(0.2)
        os.kill(watched.rank.pid, signal.SIGCONT)
        watched.expect(Beat, lambda beat: beat.state == "T")
        time.sleep(0.06)
    watched.expect(Beat, lambda beat: beat.state == "S")
    assert not [m for m in watched.messages if isinstance(m, FaultReport)]
    assert is_alive(watched.rank)


def test_guard_that_was_stopped_itself_does_not_blame_its_rank(start: Start) -> None:
    watched = start("time.sleep(100)")
    watched.expect(Beat)
    os.kill(watched.rank.pid, signal.SIGSTOP)
    watched.expect(Beat, lambda beat: beat.state == "T")
    os.kill(watched.guard.pid, signal.SIGSTOP)
    time.sleep(0.8)
    os.kill(watched.guard.pid, signal.SIGCONT)
    time.sleep(0.1)
    os.kill(watched.rank.pid, signal.SIGCONT)
    watched.messages.clear()
    watched.expect(Beat, lambda beat: beat.state == "S")
    assert not [m for m in watched.messages if isinstance(m, FaultReport)]


def kill_supervisor(watched: Watched) -> None:
    watched.supervisor.kill()
    watched.supervisor.wait()


def new_supervisor(watched: Watched) -> None:
    """Another process with the keys of the first binds the same endpoint; a beat tells it of the guard."""
    endpoint, keys = watched.link.endpoint, watched.link.keys
    watched.link.close()
    watched.context.term()
    watched.context = zmq.Context()
    watched.supervisor = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    supervisor_id = ProcessId.of(watched.supervisor.pid)
    assert supervisor_id is not None
    watched.link = GuardLink(watched.context, supervisor_id, endpoint, keys)
    watched.messages.clear()
    watched.expect(Beat)
    watched.link.introduce(watched.identity, EPOCH)


def test_guard_waits_for_another_supervisor_and_then_ends(start: Start) -> None:
    watched = start("time.sleep(100)")
    watched.expect(Beat, lambda beat: beat.step == 41)
    began = time.monotonic()
    kill_supervisor(watched)
    assert not watched.gone(0.8 * ADOPTION_WAIT_S)
    assert watched.gone() and time.monotonic() - began > ADOPTION_WAIT_S
    assert watched.guard.wait(5) != 0
    assert not watched.shm_dir.exists()


def test_guard_is_taken_over(start: Start) -> None:
    watched = start("time.sleep(100)")
    watched.expect(Beat, lambda beat: beat.step == 41)
    kill_supervisor(watched)
    new_supervisor(watched)
    hello = watched.expect(GuardHello)
    assert (hello.pid, hello.guard_pid) == (watched.hello.pid, watched.hello.guard_pid)
    assert not watched.gone(1.5 * ADOPTION_WAIT_S), "the wait went on after the take-over"
    kill_supervisor(watched)
    assert not watched.gone(0.5 * ADOPTION_WAIT_S) and watched.gone(), "the new supervisor was not watched"


def answer_beats(watched: Watched, seconds: float) -> Beat:
    """Renews the lease for some time; returns the last beat that was answered."""
    deadline = time.monotonic() + seconds
    while True:
        beat = watched.expect(Beat)
        watched.link.send(watched.identity, Lease(EPOCH, beat.sent_s))
        if time.monotonic() > deadline:
            return beat


def test_guard_on_another_host_lives_by_its_lease(start: Start) -> None:
    watched = start("time.sleep(100)", remote=True)
    kill_supervisor(watched)  # whose process it cannot see from there
    last = answer_beats(watched, 3 * LEASE_S)
    assert is_alive(watched.rank)
    assert watched.gone()
    assert LEASE_S <= time.monotonic() - last.sent_s < LEASE_S + 2.0  # on one machine, one clock
    assert watched.guard.wait(5) != 0 and not watched.shm_dir.exists()


def test_closed_connection_begins_the_wait_on_another_host(start: Start) -> None:
    for _ in range(3):  # a guard that gets no processor for as long as its lease rightly ends its rank
        watched = start("time.sleep(100)", remote=True)
        answer_beats(watched, 0.3)
        began = time.monotonic()
        watched.link.close()
        if not watched.gone(0.8 * ADOPTION_WAIT_S):
            break
    else:
        pytest.fail("the lease ended the rank, though the network lives")
    assert watched.gone() and time.monotonic() - began > ADOPTION_WAIT_S


def test_fault_without_a_supervisor_is_told_to_the_next_one(start: Start) -> None:
    watched = start("time.sleep(100)")
    watched.expect(Beat, lambda beat: beat.step == 41)
    kill_supervisor(watched)
    endpoint, keys = watched.link.endpoint, watched.link.keys
    watched.link.close()
    os.kill(watched.rank.pid, signal.SIGKILL)
    assert watched.gone()
    supervisor_id = ProcessId.of(os.getpid())
    assert supervisor_id is not None
    watched.link = GuardLink(watched.context, supervisor_id, endpoint, keys)
    watched.messages.clear()
    watched.expect(Beat)
    watched.link.introduce(watched.identity, EPOCH)
    watched.expect(GuardHello)
    assert watched.expect(FaultReport).kind == "killed"


def test_guard_of_a_world_that_is_still_starting_ends_with_the_supervisor(start: Start) -> None:
    watched = start("page.enter(Phase.LOADING); time.sleep(100)")
    watched.expect(Beat, lambda beat: beat.phase == Phase.LOADING and beat.step == 41)
    kill_supervisor(watched)
    assert watched.gone(0.8 * ADOPTION_WAIT_S)
    assert watched.guard.wait(5) != 0
    assert not watched.shm_dir.exists()


def test_guard_ends_with_mpirun(start: Start) -> None:
    parent = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
    watched = start("time.sleep(100)", [sys.executable, "-c", parent])
    guard = ProcessId(watched.hello.guard_pid, watched.hello.guard_start)
    assert guard.pid != watched.guard.pid
    watched.guard.kill()
    assert watched.gone()
    deadline = time.monotonic() + 5
    while is_alive(guard) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(guard)


def test_rank_dies_with_its_guard(start: Start) -> None:
    watched = start("time.sleep(100)")
    watched.expect(Beat, lambda beat: beat.step == 41)
    watched.guard.kill()
    assert watched.gone()


def test_sigterm_ends_guard_and_rank(start: Start) -> None:
    watched = start("time.sleep(100)")
    watched.guard.terminate()
    assert watched.gone()
    assert watched.guard.wait(5) != 0


def test_strangers_key_is_refused(start: Start) -> None:
    watched = start("time.sleep(100)")
    public_key, secret_key = zmq.curve_keypair()
    with watched.context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        stranger.curve_serverkey = watched.link.keys.server_public.encode()
        stranger.curve_publickey = public_key
        stranger.curve_secretkey = secret_key
        stranger.connect(watched.link.endpoint)
        stranger.send(Killed(EPOCH, 99).to_bytes())
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            watched.expect(Beat)
        assert not [m for m in watched.messages if isinstance(m, Killed)]


def test_guard_without_a_supervisor_says_so() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "launcher.guard", "--epoch", "1", "--", "true"], capture_output=True, text=True
    )
    assert answer.returncode == 2 and "supervisor" in answer.stderr


# --------------------------------------------------------------------------- scarce processors

SEASONED = "\nfor number in range(42, 50): page.step(number); time.sleep(0.05)\npage.enter(Phase.IDLE)\n"
STARVED = (
    SEASONED
    + """
os.sched_setaffinity(0, {int(os.environ["SCARCE_CORE"])})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
if os.path.exists("/proc/self/autogroup"):  # a rank has a session, and a group, of its own
    open("/proc/self/autogroup", "w").write("19")
page.step(51)
wanted = time.process_time() + 0.1
while time.process_time() < wanted: pass
page.enter(Phase.IDLE); time.sleep(100)
"""
)
SPINS_FOR_EVER = (
    SEASONED
    + """
os.sched_setaffinity(0, {int(os.environ["SCARCE_CORE"])})
page.step(51)
while True: pass
"""
)


@pytest.fixture
def rival(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process that wants a whole core, which is the rank's."""
    core = max(os.sched_getaffinity(0))
    monkeypatch.setenv("SCARCE_CORE", str(core))
    code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    yield process
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_rank_that_gets_no_processor_is_not_hung(start: Start, rival: subprocess.Popen[bytes]) -> None:
    watched = start(STARVED)
    stepping = Phase.STEPPING
    watched.expect(Beat, lambda beat: beat.phase == stepping and beat.step == 51 and beat.age_s > 5.0, 60.0)
    assert not [message for message in watched.messages if isinstance(message, FaultReport)]
    rival.kill()
    watched.expect(Beat, lambda beat: beat.phase == Phase.IDLE and beat.step == 51, 60.0)
    assert not [message for message in watched.messages if isinstance(message, FaultReport)]


@pytest.mark.slow
def test_a_rank_that_hangs_is_found_where_processors_are_scarce(
    start: Start, rival: subprocess.Popen[bytes]
) -> None:
    watched = start(SPINS_FOR_EVER)
    report = watched.expect(FaultReport, timeout_s=60.0)
    assert report.kind == "hung" and "s more without a processor" in report.detail


@pytest.mark.slow
def test_the_waits_of_another_rank_of_the_host_count(start: Start, rival: subprocess.Popen[bytes]) -> None:
    watched = start(SEASONED + "page.step(51); time.sleep(100)")
    starve = 'os.sched_setaffinity(0, {int(os.environ["SCARCE_CORE"])}); '
    starve += "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))"
    other = subprocess.Popen([sys.executable, "-c", f"import os\n{starve}\nwhile True: pass"])
    (watched.shm_dir / "rank-4.pid").write_text(str(other.pid))
    watched.expect(Beat, lambda beat: beat.step == 51 and beat.age_s > 5.0, 60.0)
    assert not [message for message in watched.messages if isinstance(message, FaultReport)]
    other.kill()
    other.wait()
    assert watched.expect(FaultReport, timeout_s=60.0).kind == "hung"
