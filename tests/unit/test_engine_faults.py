"""Faults on purpose: which process they hit, when, and how often. What they do is done in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.faults import Faults, FaultSpecError, InjectedFault
from engine.plan import Chunk, StepPlan


def plan(step: int, decode_tokens: list[int] | None = None, prompt: list[int] | None = None) -> StepPlan:
    chunks = [] if prompt is None else [Chunk(0, 0, prompt, [], None)]
    tokens = decode_tokens or []
    return StepPlan(step, 0, decode_handles=list(range(len(tokens))), decode_tokens=tokens, chunks=chunks)


def hits(faults: Faults, act: Any) -> bool:
    try:
        act(faults)
    except InjectedFault:
        return True
    return False


@pytest.mark.parametrize(
    ("text", "rank", "epoch", "hit"),
    [
        ("raise", 0, 1, True),
        ("raise", 1, 1, False),
        ("raise rank=1", 1, 1, True),
        ("raise rank=*", 5, 9, True),
        ("raise epoch=2", 0, 1, False),
        ("raise epoch=2", 0, 2, True),
        ("raise step=3", 0, 1, False),
        ("raise step=4", 0, 1, True),
        ("raise token=7", 0, 1, True),
        ("raise token=8", 0, 1, True),
        ("raise token=9", 0, 1, False),
        ("raise phase=idle", 0, 1, False),
        ("raise collective=1", 0, 1, False),
        ("# raise\n\nraise token=9; raise step=4", 0, 1, True),
    ],
)
def test_conditions(text: str, rank: int, epoch: int, hit: bool) -> None:
    faults = Faults(text, rank, epoch)
    assert hits(faults, lambda faults: faults.at_step(plan(4, [7], [1, 8]))) is hit


@pytest.mark.parametrize("text", ["explode", "raise when=now", "raise step", "exit=1 token"])
def test_what_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(FaultSpecError, match="allowed"):
        Faults(text, 0, 1)


def test_a_collective_of_a_step() -> None:
    faults = Faults("raise step=2 collective=3", 0, 1)
    faults.at_collective()  # of no step
    for step in (1, 2):
        faults.at_step(plan(step))
        faults.at_collective()
        faults.at_collective()
        assert hits(faults, lambda faults: faults.at_collective()) is (step == 2)


def test_a_mark_counts_over_processes(tmp_path: Path) -> None:
    text = f"raise rank=* mark={tmp_path / 'mark'} times=2"
    results = [hits(Faults(text, rank, 1), lambda faults: faults.at_step(plan(1))) for rank in range(4)]
    assert results == [True, True, False, False]


def test_a_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "faults"
    faults = Faults(f"@{file}", 0, 1)
    assert not hits(faults, lambda faults: faults.at_step(plan(1)))
    file.write_text("raise step=2")
    assert not hits(faults, lambda faults: faults.at_step(plan(1)))
    assert hits(faults, lambda faults: faults.at_step(plan(2)))
    file.unlink()
    assert not hits(faults, lambda faults: faults.at_step(plan(2)))


def test_a_file_that_changes_within_a_step_is_of_the_next_one(tmp_path: Path) -> None:
    """Native code may have taken sums of the step that nobody counted here."""
    file = tmp_path / "faults"
    faults = Faults(f"@{file}", 0, 1)
    faults.at_step(plan(1))
    file.write_text("raise collective=1")
    assert not hits(faults, lambda faults: faults.at_collective())
    faults.at_step(plan(2))
    assert hits(faults, lambda faults: faults.at_collective())


class _Phase(Enum):
    LOADING = 1


class _Page:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def enter(self, phase: _Phase) -> None:
        self.seen.append(phase)

    def collective(self) -> None:
        self.seen.append("collective")

    def load(self, done_bytes: int, total_bytes: int) -> None:
        self.seen.append(done_bytes)


def test_phases_of_the_page() -> None:
    page = _Page()
    Faults("raise phase=loading", 0, 1).watch_page(page)
    with pytest.raises(InjectedFault):
        page.enter(_Phase.LOADING)
    page = _Page()
    Faults("raise phase=loaded", 0, 1).watch_page(page)
    page.enter(_Phase.LOADING)
    page.load(10, 100)
    with pytest.raises(InjectedFault):
        page.load(60, 100)
    assert page.seen == [_Phase.LOADING, 10, 60]


def test_a_skipped_collective_is_skipped_once() -> None:
    summed: list[Any] = []

    def reduced(partial: Any) -> Any:
        summed.append(partial)
        return partial

    group = SimpleNamespace(size=2, reduced=reduced, shared_sums=lambda count: None)
    control = SimpleNamespace(broadcast_plan=lambda plan: None)
    world = SimpleNamespace(tensor_group=group, control=control, next_stage=None)
    partial = SimpleNamespace(float=lambda: "not summed")
    runner = SimpleNamespace(run=lambda plan: [group.reduced(partial) for _ in range(3)])
    Faults("skip step=2", 0, 1).watch_engine(world, runner)
    assert runner.run(plan(1)) == [partial] * 3
    assert runner.run(plan(2)) == ["not summed", partial, partial]
    assert len(summed) == 5


def test_python_takes_the_sums_of_steps_that_a_fault_is_meant_for() -> None:
    sums = object()
    group = SimpleNamespace(size=2, reduced=lambda partial: partial, shared_sums=lambda count: sums)
    control = SimpleNamespace(broadcast_plan=lambda plan: None)
    world = SimpleNamespace(tensor_group=group, control=control, next_stage=None)
    runner = SimpleNamespace(run=lambda plan: group.shared_sums(576))
    Faults(
        "hang collective=100 step=2; skip step=3; print=here step=4; kill rank=1 collective=1", 0, 1
    ).watch_engine(world, runner)
    assert runner.run(plan(1)) is sums
    assert runner.run(plan(2)) is None
    assert runner.run(plan(3)) is None
    group.reduced(SimpleNamespace(float=lambda: "not summed"))
    assert runner.run(plan(4)) is sums


@pytest.mark.parametrize(
    ("action", "code"),
    [
        ("exit=7", 7),
        ("kill", -signal.SIGKILL),
        ("segv", -signal.SIGSEGV),
        ("abort", -signal.SIGABRT),
        ("memory", 1),
        ("raise", 1),
    ],
)
def test_ends(action: str, code: int) -> None:
    program = (
        f"from engine.faults import Faults; Faults({action!r}, 0, 1).at_step(type('P', (), {{'step': 1}}))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == code
