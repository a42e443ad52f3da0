"""The record of a fault: what is in it from the start, and what is filled in as recovery goes on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from gateway.control_messages import Fault, InFlight
from gateway.fault_metrics import FaultMetrics
from launcher import post_mortem
from launcher.fault_log import KEPT_FAULTS, FaultLog
from launcher.status import format_cluster
from launcher.world_records import Doing, WorldFault


class Log:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def error(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    info = error


def world(epoch: int, is_spare: bool = False, beat: Doing | None = None) -> Any:
    watch = SimpleNamespace(hello=SimpleNamespace(pid=77), doing=beat)
    return SimpleNamespace(epoch=epoch, is_spare=is_spare, plan=SimpleNamespace(tp=2), ranks={3: watch})


SEGV = WorldFault(
    "killed",
    3,
    "here",
    "rank 3 was killed by SIGSEGV",
    0.01,
    -11,
    "its last line",
    Doing("stepping", 5, 2, 0.1),
    "Fatal Python error",
)


def test_a_record_is_filled_by_and_by() -> None:
    log = Log()
    faults = FaultLog(log)  # type: ignore[arg-type]
    assert not faults
    faults.record(world(4), SEGV, "world fault", None)
    [fault] = faults.records
    assert (fault.epoch, fault.kind, fault.rank, fault.tp, fault.pp, fault.pid) == (4, "killed", 3, 1, 1, 77)
    assert (fault.signal, fault.exit_code) == ("SIGSEGV", None)
    assert (fault.phase, fault.step, fault.collective, fault.progress_age_s) == ("stepping", 5, 2, 0.1)
    assert (fault.last_lines, fault.stacks) == ("its last line", "Fatal Python error")
    assert (fault.abort_s, fault.recover_s, fault.resume_s) == (None, None, None)
    event, fields = log.events[0]
    assert event == "world fault" and fields["signal"] == "SIGSEGV" and fields["last_line"] == "its last line"
    versions = [faults.version]
    faults.on_dead(4, 0.02)
    versions.append(faults.version)
    faults.on_served(5, 0.5)
    versions.append(faults.version)
    faults.on_resumed(5, fault.at + 1.5)
    versions.append(faults.version)
    [fault] = faults.records
    assert (fault.abort_s, fault.recover_s, fault.resume_s) == (0.02, 0.5, 1.5)
    assert versions == sorted(set(versions))


def test_what_the_supervisor_finds_itself_is_told_from_the_last_beat() -> None:
    faults = FaultLog(Log())  # type: ignore[arg-type]
    lost = WorldFault("lost", 3, "there", "the guard of rank 3 has been silent", 1.0)
    faults.record(world(4, beat=Doing("stepping", 9, 1, 0.3)), lost, "world fault", None)
    assert (faults.records[0].phase, faults.records[0].step) == ("stepping", 9)


def test_a_spare_that_dies_interrupts_nothing() -> None:
    faults = FaultLog(Log())  # type: ignore[arg-type]
    faults.record(world(5, is_spare=True), SEGV, "spare fault", 0.0)
    faults.on_served(6, 3.0)
    faults.on_resumed(6, faults.records[0].at + 1)
    fault = faults.records[0]
    assert fault.detail.startswith("spare: ") and (fault.recover_s, fault.resume_s) == (0.0, None)


def test_requests_in_flight_are_those_of_all_fronts() -> None:
    log = Log()
    faults = FaultLog(log)  # type: ignore[arg-type]
    first, second = InFlight(4, 12, tuple(f"a{n}" for n in range(10))), InFlight(4, 1, ("b0",))
    faults.on_in_flight(1, first)  # a front may know it first
    assert faults.records == [] and log.events == []
    faults.record(world(4), SEGV, "world fault", None)
    assert faults.records[0].in_flight is None
    for _ in range(3):  # they say it every second
        faults.on_in_flight(1, first)
        faults.on_in_flight(2, second)
    [fault] = faults.records
    assert (fault.in_flight, fault.in_flight_ids) == (13, first.ids), "ten are enough"
    assert [fields["requests"] for event, fields in log.events if event == "requests in flight"] == [12, 13]
    faults.record(world(5), SEGV, "world fault", None)
    faults.on_in_flight(1, InFlight(5, 1, ("a3",)))
    faults.on_in_flight(2, second)
    assert [(fault.in_flight, fault.in_flight_ids) for fault in faults.records] == [
        (1, ("a3",)),
        (13, first.ids),
    ]
    shown = "\n".join(format_cluster({"worlds": [], "faults": msgspec.to_builtins(faults.records)}))
    assert "in flight: 1 (a3)" in shown and "in flight: 13 (a0, " in shown and "a9, ...)" in shown


def test_the_last_ones_are_kept() -> None:
    faults = FaultLog(Log())  # type: ignore[arg-type]
    for epoch in range(KEPT_FAULTS + 5):
        faults.record(world(epoch), SEGV, "world fault", 0.0)
    assert [fault.epoch for fault in faults.records] == list(range(KEPT_FAULTS + 4, 4, -1))


def test_metrics_count_each_fault_and_each_time_once() -> None:
    metrics = FaultMetrics("m")
    first = Fault(1, 10.0, "killed", 0, "here", "", detect_s=0.03)
    recovered = Fault(1, 10.0, "killed", 0, "here", "", detect_s=0.03, recover_s=0.4)
    for table in ([], [first], [first], [recovered], [Fault(2, 20.0, "hung", 1, "here", ""), recovered]):
        metrics.update(table)
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in metrics.collect()
        for sample in family.samples
    }
    assert samples["phalanx_faults_total", "m", "killed"] == 1
    assert samples["phalanx_faults_total", "m", "hung"] == 1
    assert samples["phalanx_faults_total", "m", "lost"] == 0
    assert samples["phalanx_fault_detect_seconds_count", "m"] == 1
    assert samples["phalanx_fault_recovery_seconds_sum", "m"] == pytest.approx(0.4)
    assert samples["phalanx_fault_resume_seconds_count", "m"] == 0


def test_status_shows_place_times_and_last_words() -> None:
    faults = FaultLog(Log())  # type: ignore[arg-type]
    faults.record(world(4), SEGV, "world fault", None)
    [_, _, first, second, third] = format_cluster(
        {"worlds": [], "faults": msgspec.to_builtins(faults.records)}
    )
    assert first.endswith("world 4  killed: rank 3 was killed by SIGSEGV")
    assert second.strip() == "tp 1, pp 1 on here; detected after 0.01 s; not recovered yet"
    assert third.strip() == "it said: its last line"


def test_stacks_are_found_in_the_output(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    assert post_mortem.python_stacks(log) == ""
    log.write_text("loading\n")
    assert post_mortem.python_stacks(log) == ""
    old = "Traceback (most recent call last):\n  an older one\n"
    new = "Fatal Python error: Segmentation fault\n\nCurrent thread 0x1:\n  File x"
    log.write_text(f"a line\n{old}{new}\n")
    assert post_mortem.python_stacks(log) == new


def test_a_rank_without_the_handler_is_sent_no_signal(tmp_path: Path) -> None:
    assert post_mortem.dump_stacks(1, tmp_path / "none") == ""


def test_the_line_that_tells_most() -> None:
    dump = (
        "a warning\nFatal Python error: Segmentation fault\n\n  File x\n\nExtension modules: a, b (total: 2)"
    )
    assert post_mortem.telling_line(dump) == "Fatal Python error: Segmentation fault"
    assert post_mortem.telling_line("Traceback\nValueError: no") == "ValueError: no"
    assert post_mortem.telling_line("") is None
