"""Which rank of a host holds the others up, as their pages say."""

from __future__ import annotations

from pathlib import Path

from launcher.laggards import Laggards
from launcher.watch import Phase, ProgressPage


def page(folder: Path, rank: int, step: int, collectives: int) -> ProgressPage:
    made = ProgressPage.create(folder / f"rank-{rank}.progress")
    made.step(step)
    for _ in range(collectives):
        made.collective()
    return made


def test_who_is_behind(tmp_path: Path) -> None:
    waits = page(tmp_path, 1, 7, 3)
    ranks = Laggards(tmp_path, 1)
    assert ranks.behind(waits.read()) is None
    other = page(tmp_path, 0, 7, 3)
    assert ranks.behind(waits.read()) is None, "as far as this one"
    other.step(7)
    other.collective()
    assert ranks.behind(waits.read()) == "rank-0"
    assert Laggards(tmp_path, 0).behind(other.read()) is None, "the one that holds up is judged itself"
    other.step(6)
    assert ranks.behind(waits.read()) == "rank-0"
    other.step(8)
    assert ranks.behind(waits.read()) is None
    other.step(6)
    other.enter(Phase.IDLE)
    assert ranks.behind(waits.read()) is None, "one that is not in a step holds nobody up"


def test_pages_that_are_being_made_say_nothing(tmp_path: Path) -> None:
    waits = page(tmp_path, 1, 7, 3)
    (tmp_path / "rank-0.progress").touch()
    (tmp_path / "rank-2.progress").write_bytes(b"\xff" * 4096)
    assert Laggards(tmp_path, 1).behind(waits.read()) is None
