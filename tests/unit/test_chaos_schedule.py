"""The schedule of chaos runs: any fault of it can be had again, every kind comes, and the log is read as written."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from benchmarks.supervisor_log import events, parse
from engine.faults import parse_faults
from launcher.logs import EventLog
from tests.recovery.chaos.schedule import (
    _CRAMPED,
    _INSIDE,
    _OF_SPARE,
    _OUTSIDE,
    _OVER_HOSTS,
    CUTS,
    INSIDE,
    OF_SPARE,
    SHORTAGES,
    Deployment,
    Kind,
    Place,
    draw,
)

SHAPES = [Deployment("none"), Deployment("warm", tp=2, pp=2), Deployment("hot", tp=1, pp=2)]


def test_a_fault_depends_on_seed_number_and_shape_alone() -> None:
    for shape in SHAPES:
        first = [draw(7, number, shape) for number in range(1, 50)]
        assert first == [draw(7, number, shape) for number in range(1, 50)]
        assert first != [draw(8, number, shape) for number in range(1, 50)]


def test_every_kind_comes_and_fits() -> None:
    for shape in SHAPES:
        faults = [draw(1, number, shape) for number in range(1, 2000)]
        pairs = {(fault.kind, fault.target) for fault in faults}
        wanted = {(kind, target) for kind, target, _ in _OUTSIDE + _INSIDE}
        if shape.spare != "none":
            wanted |= {(kind, target) for kind, target, _ in _OF_SPARE}
        assert pairs == wanted
        assert {fault.rank for fault in faults} == set(range(shape.size))
        assert any(fault.second is not None for fault in faults)
        for fault in faults:
            assert fault.spare_parked or fault.target not in OF_SPARE
            assert fault.kind is not Kind.KILL_IN_BROADCAST or fault.rank == 0


def test_machine_and_network_have_faults_of_their_own() -> None:
    for place, wanted in ((Place.CRAMPED, _CRAMPED), (Place.HOSTS, _OVER_HOSTS)):
        faults = [draw(1, number, Deployment("none", place=place)) for number in range(1, 500)]
        assert {(fault.kind, fault.target) for fault in faults} == {(kind, who) for kind, who, _ in wanted}
        for fault in faults:
            assert (fault.lasts_s > 0) == (fault.kind in (*CUTS, *SHORTAGES))
            assert place is Place.CRAMPED or fault.rank == 0, "rank 1 has a pid of another host"


def test_faults_inside_are_understood_by_the_engine() -> None:
    for kind, text in INSIDE.items():
        [spec] = parse_faults(f"{text.format(collective=3)} rank=1 epoch=2 mark=/tmp/x")
        assert spec.is_for(rank=1, epoch=2) and not spec.is_for(rank=0, epoch=2), kind


def test_the_supervisor_s_log_is_read_as_it_is_written(tmp_path: Path) -> None:
    log = EventLog("test-of-the-log")
    log.to_file(tmp_path / "log")
    began = time.time()
    log.error(
        "world fault", epoch=3, kind="killed", detail='rank 0 said "a=b" and died', detect_s=0.01, rank=None
    )
    log.info("world recovered", epoch=4, recover_s=1.5)
    log.close()
    logging.raiseExceptions = True
    fault, recovered = events(tmp_path / "log", began)
    assert (fault.name, fault.epoch) == ("world fault", 3)
    assert fault.fields["detail"] == 'rank 0 said "a=b" and died' and fault.fields["detect_s"] == "0.010"
    assert (recovered.name, recovered.epoch) == ("world recovered", 4)
    assert began - 0.002 <= fault.at <= recovered.at <= time.time()
    assert list(events(tmp_path / "log", time.time() + 1)) == []
    assert list(events(tmp_path / "none")) == []
    assert parse("Traceback (most recent call last):") is None
