"""The parts of a start add up to the whole of it."""

from __future__ import annotations

import pytest

from launcher.start_times import StartTimes
from launcher.watch import Phase


def test_the_slowest_rank_counts() -> None:
    times = StartTimes(10.0)
    times.note([], 2, 10.1)
    times.note([Phase.IMPORTING], 2, 10.2)  # the other has not reported
    times.note([Phase.IMPORTING, Phase.STARTING], 2, 10.3)
    times.note([Phase.IMPORTING, Phase.IMPORTING], 2, 10.5)
    times.note([Phase.JOINING, Phase.IMPORTING], 2, 11.0)
    times.note([Phase.LOADING, Phase.JOINING], 2, 12.0)
    times.note([Phase.LOADING, Phase.LOADING], 2, 12.25)
    times.note([Phase.IDLE, Phase.STEPPING], 2, 13.0)
    parts = times.parts(13.5)
    assert parts == pytest.approx(
        {"processes_s": 0.5, "imports_s": 1.5, "join_s": 0.25, "load_s": 0.75, "front_s": 0.5}
    )
    assert sum(parts.values()) == pytest.approx(3.5)


def test_what_was_not_seen_counts_into_what_was_before() -> None:
    times = StartTimes(0.0)
    times.note([Phase.LOADING], 1, 2.0)
    assert times.parts(3.0) == {"processes_s": 2.0, "load_s": 1.0}


@pytest.mark.parametrize("order", [(Phase.IMPORTING, Phase.PARKED, Phase.JOINING, Phase.LOADING)])
def test_a_warm_spare(order: tuple[Phase, ...]) -> None:
    times = StartTimes(0.0)
    for moment, phase in enumerate(order, 1):
        times.note([phase, Phase.LOADING if phase is Phase.JOINING else phase], 2, float(moment))
    assert times.parts(5.0) == {
        "processes_s": 1.0, "imports_s": 1.0, "parked_s": 1.0, "join_s": 1.0, "load_s": 1.0
    }  # fmt: skip


def test_a_hot_spare_goes_on_loading_when_its_turn_has_come() -> None:
    times = StartTimes(0.0)
    times.note([Phase.LOADING, Phase.LOADING], 2, 1.0)
    times.note([Phase.LOADING, Phase.PARKED], 2, 2.0)
    times.note([Phase.PARKED, Phase.PARKED], 2, 3.0)
    times.note([Phase.PARKED, Phase.LOADING], 2, 60.0)
    times.note([Phase.LOADING, Phase.LOADING], 2, 60.5)
    times.note([Phase.IDLE, Phase.IDLE], 2, 61.0)
    assert times.parts(61.0) == {"processes_s": 1.0, "load_s": 1.5, "parked_s": 58.5, "front_s": 0.0}
