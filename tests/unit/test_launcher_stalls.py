"""When a world on its way is given up."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.guard_messages import Beat, GuardHello
from launcher.stalls import JOIN_TIMEOUT_S, MEETING_STALL_S, STARTUP_STALL_S, find_stall
from launcher.watch import Phase
from launcher.world_records import RankWatch


def ranks(*phases: Phase, age_s: float) -> dict[int, RankWatch]:
    return {
        rank: RankWatch(
            GuardHello(1, rank, "n1", "boot/1", 10, 11, 12, 13),
            b"",
            0.0,
            Beat(1, rank, "S", phase, 0, 0, age_s, 0, 0, None, 0, 0, 0.0),
        )
        for rank, phase in enumerate(phases)
    }


@pytest.mark.parametrize(
    ("phases", "limit_s"),
    [
        ((Phase.IMPORTING, Phase.IMPORTING), STARTUP_STALL_S),
        ((Phase.JOINING, Phase.IMPORTING), STARTUP_STALL_S),
        ((Phase.JOINING, Phase.JOINING), MEETING_STALL_S),
        ((Phase.LOADING, Phase.JOINING), STARTUP_STALL_S),
    ],
)
def test_a_start_without_progress(phases: tuple[Phase, ...], limit_s: float, tmp_path: Path) -> None:
    def found(age_s: float) -> object:
        return find_stall(ranks(*phases, age_s=age_s), 2, 1000.0, False, tmp_path / "mpirun.log")

    assert found(limit_s - 1) is None
    fault = found(limit_s + 1)
    assert fault is not None and "no rank made progress" in str(fault)


def test_a_guard_that_does_not_report(tmp_path: Path) -> None:
    one = ranks(Phase.JOINING, age_s=0.0)
    assert find_stall(one, 2, JOIN_TIMEOUT_S - 1, False, tmp_path / "mpirun.log") is None
    fault = find_stall(one, 2, JOIN_TIMEOUT_S + 1, False, tmp_path / "mpirun.log")
    assert fault is not None and "rank 1 did not report" in str(fault)
