"""Faults on purpose, for tests of what a world does when a rank fails. Off, and not even imported, unless the
environment variable PHALANX_FAULTS is set; then `engine.rank` calls it. It must change nothing in a rank for which no
fault is meant.

PHALANX_FAULTS holds faults, one a line or with `;` between them, or `@FILE`: a file that holds them, read again
whenever it changes. A fault is an action and then conditions, all of which must hold:

    segv token=1234                   every rank 0 that computes token 1234, in every world
    hang rank=1 step=50 epoch=3       rank 1 of world 3, in step 50
    kill rank=* phase=loading mark=/tmp/once times=1     once, whichever rank comes first

Actions:
    exit[=CODE]      ends the process (1)
    kill, stop       SIGKILL or SIGSTOP to itself
    segv, abort      a segmentation fault; abort(3)
    hang             sleeps for ever where it is
    sleep=SECONDS    is late, and then goes on
    raise            an exception
    memory[=BYTES]   allocates and fills so much (more than any machine has)
    skip             leaves out the next collective of tensors, and then goes on
    print=TEXT       writes a line to standard error, so that a test sees what it would hit

Conditions:
    rank=N or *      of the MPI launcher (0)
    epoch=N          in this world only
    phase=NAME       when the rank enters this phase: importing, joining, loading, parked, idle, stopping; `loaded`
                     is when half of the weights are in place. Without it, the fault is of a step:
    step=N           in step N; without it, in any
    token=N          in a step that computes this token, in a prompt or behind it
    collective=N     when the Nth collective of the step begins (1 is the first); without it, as the step begins
    plan=sent        rank 0: when the plan is on its way to the others, and before it computes anything
    mark=PATH        with `times=N` (1): only so often over all processes; PATH.1 to PATH.N are made as it happens
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

VARIABLE = "PHALANX_FAULTS"
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
_ACTIONS = ("exit", "kill", "stop", "segv", "abort", "hang", "sleep", "raise", "memory", "skip", "print")
_CONDITIONS = ("rank", "epoch", "phase", "step", "token", "collective", "plan", "mark", "times")


class FaultSpecError(ValueError):
    """PHALANX_FAULTS says something that is not understood."""


class InjectedFault(RuntimeError):
    """What `raise` raises."""


@dataclass(frozen=True)
class FaultSpec:
    """One fault: see the module."""

    action: str
    value: str = ""
    conditions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> FaultSpec:
        """Raises FaultSpecError."""
        action, _, value = text.split()[0].partition("=")
        if action not in _ACTIONS:
            raise FaultSpecError(f"{VARIABLE}: {action!r}; allowed actions: {', '.join(_ACTIONS)}")
        conditions = {}
        for word in text.split()[1:]:
            name, equals, wanted = word.partition("=")
            if name not in _CONDITIONS or not equals:
                raise FaultSpecError(f"{VARIABLE}: {word!r}; allowed conditions: {', '.join(_CONDITIONS)}")
            conditions[name] = wanted
        return cls(action, value, conditions)

    def is_for(self, rank: int, epoch: int) -> bool:
        wanted = self.conditions.get("rank", "0")
        return wanted in ("*", str(rank)) and self.conditions.get("epoch", str(epoch)) == str(epoch)


def parse_faults(text: str) -> list[FaultSpec]:
    """All faults of a text. Raises FaultSpecError."""
    lines = text.replace(";", "\n").splitlines()
    return [FaultSpec.parse(line) for line in lines if line.strip() and not line.lstrip().startswith("#")]


class Faults:
    """The faults that are meant for this process, and the places where they can happen."""

    def __init__(self, text: str, rank: int, epoch: int) -> None:
        """`text`: the variable's value. Raises FaultSpecError."""
        self._rank = rank
        self._epoch = epoch
        self._file = Path(text[1:]) if text.startswith("@") else None
        self._file_stamp: tuple[int, int] | None = None
        self._specs = [] if self._file is not None else self._mine(text)
        self._plan: Any = None
        """Of the step that is computed."""
        self._collective = 0
        self._skips_next = False
        self._half_loaded = False

    @classmethod
    def from_environment(cls, epoch: int, page: Any) -> Faults:
        """Of this rank, whose number is that of its MPI launcher; `page`: see watch_page. Raises
        FaultSpecError."""
        rank = next((int(os.environ[name]) for name in _RANK_VARIABLES if name in os.environ), 0)
        faults = cls(os.environ[VARIABLE], rank, epoch)
        faults.watch_page(page)
        return faults

    def watch_page(self, page: Any) -> None:
        """Puts itself in the way of a progress page's phases, collectives and loading."""
        enter, collective, load = page.enter, page.collective, page.load

        def on_enter(phase: Any) -> None:
            enter(phase)
            self.at_phase(phase.name.lower())

        def on_collective() -> None:
            collective()
            self.at_collective()

        def on_load(done_bytes: int, total_bytes: int) -> None:
            load(done_bytes, total_bytes)
            if not self._half_loaded and total_bytes and 2 * done_bytes >= total_bytes:
                self._half_loaded = True
                self.at_phase("loaded")

        page.enter, page.collective, page.load = on_enter, on_collective, on_load

    def watch_engine(self, world: Any, runner: Any) -> None:
        """Puts itself in the way of the plans, the steps and the collectives of tensors."""
        run, broadcast = runner.run, world.control.broadcast_plan

        def on_run(plan: Any) -> Any:
            self.at_step(plan)
            return run(plan)

        def on_broadcast(plan: Any) -> None:
            broadcast(plan)
            self._fire(lambda conditions: conditions.get("plan") == "sent" and "step" not in conditions)

        runner.run, world.control.broadcast_plan = on_run, on_broadcast
        group = world.tensor_group
        if getattr(group, "size", 1) > 1:
            group.reduced = self._skippable(group.reduced, lambda partial: partial.float())
            shared_sums = group.shared_sums

            def on_shared_sums(count: int) -> Any:
                return None if self._stops_at_collectives() else shared_sums(count)

            # Native code takes sums without a look at this: where one of them is meant, Python takes them all.
            group.shared_sums = on_shared_sums
        if world.next_stage is not None:
            world.next_stage.send = self._skippable(world.next_stage.send, lambda *_: None)

    def at_phase(self, name: str) -> None:
        self._fire(lambda conditions: conditions.get("phase") == name)

    def at_step(self, plan: Any) -> None:
        """A step begins to be computed; `plan` has `step`, `decode_tokens` and `chunks`."""
        self._plan = plan
        self._collective = 0
        self._fire(lambda conditions: "collective" not in conditions and self._is_of_step(conditions))

    def at_collective(self) -> None:
        """A collective, or a transfer to another stage, begins."""
        self._collective += 1
        number = str(self._collective)
        # What a file says now is of the next step: of this one, native code may have taken sums without a look.
        self._fire(
            lambda conditions: conditions.get("collective") == number and self._is_of_step(conditions),
            reads_again=False,
        )

    # ----------------------------------------------------------------------- inside

    def _is_of_step(self, conditions: dict[str, str]) -> bool:
        plan = self._plan
        if plan is None or "phase" in conditions or "plan" in conditions:
            return False
        if "step" in conditions and conditions["step"] != str(plan.step):
            return False
        if "token" not in conditions:
            return True
        token = int(conditions["token"])
        return token in plan.decode_tokens or any(token in chunk.token_ids for chunk in plan.chunks)

    def _stops_at_collectives(self) -> bool:
        """Whether something may happen to a collective of this step."""
        return self._skips_next or any(
            "collective" in spec.conditions and self._is_of_step(spec.conditions) for spec in self._specs
        )

    def _mine(self, text: str) -> list[FaultSpec]:
        return [spec for spec in parse_faults(text) if spec.is_for(self._rank, self._epoch)]

    def _fire(self, matches: Callable[[dict[str, str]], bool], reads_again: bool = True) -> None:
        if self._file is not None and reads_again:
            self._read_again(self._file)
        for spec in list(self._specs):
            if matches(spec.conditions) and self._may(spec):
                self._do(spec)

    def _read_again(self, file: Path) -> None:
        try:
            stat = file.stat()
            stamp = (stat.st_mtime_ns, stat.st_ino)
            if stamp != self._file_stamp:
                self._specs = self._mine(file.read_text())
                self._file_stamp = stamp
        except OSError:
            self._specs, self._file_stamp = [], None

    def _may(self, spec: FaultSpec) -> bool:
        """Whether it has not happened often enough; counts it."""
        mark = spec.conditions.get("mark")
        if mark is None:
            return True
        for number in range(1, int(spec.conditions.get("times", "1")) + 1):
            with contextlib.suppress(FileExistsError):
                os.close(os.open(f"{mark}.{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
                return True
        return False

    def _do(self, spec: FaultSpec) -> None:
        if spec.action == "exit":
            os._exit(int(spec.value or 1))
        elif spec.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # the signal comes at the latest here
        elif spec.action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif spec.action == "segv":
            ctypes.string_at(0)
        elif spec.action == "abort":
            os.abort()
        elif spec.action == "hang":
            while True:
                time.sleep(3600)
        elif spec.action == "sleep":
            time.sleep(float(spec.value or 1))
        elif spec.action == "raise":
            raise InjectedFault(f"{VARIABLE}: {spec.value or 'an exception on purpose'}")
        elif spec.action == "memory":
            self._hoard = np.ones(int(spec.value or 2**52), dtype=np.uint8)
        elif spec.action == "skip":
            self._skips_next = True
        elif spec.action == "print":
            print(f"fault: {spec.value} rank {self._rank}", file=sys.stderr, flush=True)

    def _skippable(self, call: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any) -> Any:
            if self._skips_next:
                self._skips_next = False
                return instead(*arguments)
            return call(*arguments)

        return guarded
