"""Hosts that fail again and again are left out, as long as the others suffice."""

from __future__ import annotations

from launcher.host_faults import WINDOW_S, HostFaults

SLOTS = {"a": 2, "b": 2, "c": 2}


def faults(*hosts_and_times: tuple[str, float], kind: str = "killed") -> HostFaults:
    counted = HostFaults()
    for host, at in hosts_and_times:
        counted.note(host, kind, at)
    return counted


def test_three_faults_in_ten_minutes() -> None:
    counted = faults(("b", 0.0), ("b", 10.0))
    assert counted.choose(SLOTS, 4, 20.0) == SLOTS
    counted.note("b", "lost", 20.0)
    assert counted.choose(SLOTS, 4, 20.0) == {"a": 2, "c": 2}
    assert counted.choose(SLOTS, 4, WINDOW_S + 1) == SLOTS


def test_three_faults_over_a_longer_time_are_nothing() -> None:
    assert faults(("b", 0.0), ("b", 400.0), ("b", 700.0)).choose(SLOTS, 4, 701.0) == SLOTS


def test_never_more_than_the_others_can_carry() -> None:
    counted = faults(*[("b", float(at)) for at in range(3)])
    assert counted.choose(SLOTS, 6, 5.0) == SLOTS
    assert counted.choose({"b": 2}, 2, 5.0) == {"b": 2}


def test_the_longest_quiet_one_comes_back_first() -> None:
    counted = faults(*[("a", float(at)) for at in range(3)], *[("b", float(at)) for at in range(10, 13)])
    assert counted.suspects(20.0) == ["b", "a"]
    assert counted.choose(SLOTS, 4, 20.0) == {"a": 2, "c": 2}
    assert counted.choose(SLOTS, 2, 20.0) == {"c": 2}


def test_what_is_not_the_hosts_fault() -> None:
    counted = faults(("b", 0.0), ("b", 1.0), ("b", 2.0), kind="start")
    counted.note(None, "mpirun", 3.0)
    assert counted.suspects(3.0) == []
