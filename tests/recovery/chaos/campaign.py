"""A campaign: deployments one after the other, each under load and hit by its part of the schedule, until the number
of faults is reached. Everything is on disk after each fault, so that a campaign that was cut off goes on.

Run by `python -m tests.recovery.chaos` and by the tests.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil
from msgspec import Struct, field

from tests.recovery.chaos import baseline
from tests.recovery.chaos.checker import Bounds, Violation, check
from tests.recovery.chaos.deployment import (
    GONE_WITHIN_S,
    POLL_S,
    Deployment,
    Table,
    active,
    coming,
    is_parked,
    leftovers_of_deployment,
    leftovers_of_world,
    spare_of,
)
from tests.recovery.chaos.history import Detection, Expects, History, Oracle
from tests.recovery.chaos.injection import Injector, Struck
from tests.recovery.chaos.load import Load
from tests.recovery.chaos.schedule import OF_SPARE, Fault, Place, Target, draw
from tests.recovery.chaos.schedule import Deployment as Shape
from tests.recovery.chaos.surroundings import Surroundings
from tests.references import MODEL

SHAPES = [
    Shape("warm"),
    Shape("hot"),
    Shape("none"),
    Shape("hot", tp=1, pp=2),
    Shape("warm", tp=2, pp=2),
    Shape("hot", tp=2, pp=2),
    Shape("none", tp=1, pp=2),
]
"""The usual ones, in turn."""
ELSEWHERE = {
    Place.CRAMPED: [Shape("hot", place=Place.CRAMPED), Shape("none", place=Place.CRAMPED)],
    Place.HOSTS: [Shape("none", place=Place.HOSTS), Shape("warm", place=Place.HOSTS)],
}
BOUNDS = Bounds(silence_s=75.0, detect_s=45.0, recover_s=60.0)
"""Wide, since a machine under test is shared with what tests it: these tell slow from never."""
READY_S = 90.0
FLOWS_S = 60.0
CALM_S = 1.0
"""Wait after something that nobody may take for a fault."""
DRAIN_S = 150.0


class Leg(Struct):
    """What one deployment of a campaign went through."""

    spare: str
    tp: int
    pp: int
    numbers: list[int]
    """Faults of the schedule that are done."""
    history: History
    cores: int
    started_at: float
    ended_at: float = 0.0
    violations: list[Violation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    place: Place = Place.USUAL


@dataclass(frozen=True)
class Plan:
    """What a campaign is to do."""

    seed: int
    faults: int
    folder: Path
    """State and logs."""
    shapes: Sequence[Shape]
    faults_a_leg: int = 20
    num_http: int = 5
    num_zmq: int = 3
    deterministic: bool = False
    """Whether answers in bfloat16 have to be, bit for bit, those that the deployment gives undisturbed."""
    calm_s: float = 0.0
    """With `faults` 0: how long each shape is under load without any fault, to see that none is found."""


async def run(plan: Plan, oracle: Oracle, around: Surroundings | None = None) -> list[Leg]:
    """Goes on where the folder's state ends. `around`: what this thread has entered, for shapes of another place than
    the usual. Returns all legs."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    legs = list(load_legs(plan.folder))
    for shape, numbers in _legs_to_do(plan, legs):
        file = plan.folder / f"leg-{len(legs) + 1:04d}.json"
        history = History(spare=shape.spare)
        leg = Leg(
            shape.spare,
            shape.tp,
            shape.pp,
            [],
            history,
            len(os.sched_getaffinity(0)),
            time.time(),
            place=shape.place,
        )
        legs.append(leg)
        await _Runner(plan, shape, leg, file, oracle, around or Surroundings()).run(numbers)
    return legs


def load_legs(folder: Path) -> Iterator[Leg]:
    for file in sorted(folder.glob("leg-*.json")):
        yield msgspec.json.decode(file.read_bytes(), type=Leg)


def _legs_to_do(plan: Plan, done: Sequence[Leg]) -> Iterator[tuple[Shape, list[int]]]:
    if plan.faults == 0:
        yield from ((shape, []) for shape in plan.shapes[len(done) :])
        return
    finished = {number for leg in done for number in leg.numbers}
    for index, first in enumerate(range(1, plan.faults + 1, plan.faults_a_leg)):
        last = min(first + plan.faults_a_leg - 1, plan.faults)
        numbers = [number for number in range(first, last + 1) if number not in finished]
        if numbers:
            yield plan.shapes[index % len(plan.shapes)], numbers


def _is_aside(detection: Detection) -> bool:
    """Whether it was no world that served."""
    return detection.spare or detection.epoch is None


class _Runner:
    """One leg."""

    def __init__(
        self, plan: Plan, shape: Shape, leg: Leg, file: Path, oracle: Oracle, around: Surroundings
    ) -> None:
        self._around = around
        self._plan = plan
        self._shape = shape
        self._leg = leg
        self._file = file
        self._oracle = oracle
        self._bounds = msgspec.structs.replace(BOUNDS, exact=plan.deterministic)
        self._checked: set[str] = set()

    async def run(self, numbers: Sequence[int]) -> None:
        """The deployment from its start to its end, with these faults."""
        scratch = Path(tempfile.mkdtemp(prefix="phalanx-chaos-", dir=self._around.disk))
        run_dir = scratch / "run"
        try:
            self._deployment = await Deployment.start(
                MODEL, self._shape, run_dir, scratch / "faults", self._plan.deterministic, self._around
            )
            served = self._deployment.served
            self._injector = Injector(served, scratch / "faults", self._around)
            prefix = f"{self._file.stem}-"
            dice = random.Random(f"{self._plan.seed} {self._file.stem} load")
            self._load = Load(served.url, self._deployment.zmq, served.model, dice, prefix)
            try:
                await self._live(numbers)
            except asyncio.CancelledError:
                await self._load.drain(0.0)
                self._deployment.served.process.terminate()  # at the second signal it finishes nothing any more
                raise
            finally:
                self._injector.clear()
                served = self._deployment.served
                if not self._deployment.has_ended:
                    await asyncio.to_thread(served.stop)
                await self._deployment.close()
            leg = self._leg
            leg.history.leftovers += leftovers_of_deployment(served, self._deployment.zmq)
            leg.ended_at = time.time()
            self._save()
            self._report_violations()
        finally:
            self._keep_logs(scratch)
            shutil.rmtree(scratch, ignore_errors=True)

    async def _live(self, numbers: Sequence[int]) -> None:
        if self._plan.deterministic:
            self._oracle = await baseline.take(self._load)
        began = time.time()
        self._load.start(self._plan.num_http, self._plan.num_zmq)
        await self._load.wait_flowing(began, FLOWS_S)
        for number in numbers:
            fault = draw(self._plan.seed, number, self._shape)
            if self._deployment.has_ended:
                break
            await self._episode(fault)
            self._leg.numbers.append(number)
            self._save()
            self._report_violations()
        await self._stay_calm(self._plan.calm_s if not numbers else 0.0)
        whole = await self._load.drain(DRAIN_S)
        if not whole:
            self._note(f"some requests had no end {DRAIN_S:.0f} s after the last was sent")
        if self._deployment.has_ended:
            code = self._deployment.served.process.returncode
            self._leg.history.died = f"exit code {code}: {self._deployment.served.errors()[-600:]}"
        self._take_log()
        self._leg.history.requests = self._load.requests

    async def _stay_calm(self, seconds: float) -> None:
        ends_at = time.monotonic() + seconds
        while time.monotonic() < ends_at and not self._deployment.has_ended:
            await asyncio.sleep(min(30.0, max(0.0, ends_at - time.monotonic())))
            self._save()
            self._report_violations()

    # ----------------------------------------------------------------- one fault

    async def _episode(self, fault: Fault) -> None:
        world, spare, next_epoch = await self._wait_ready(fault)
        if world is None or (spare is None and fault.target in OF_SPARE):
            self._note(f"fault {fault.number} left out: no world, or no spare, within {READY_S:.0f} s")
            return
        await asyncio.sleep(fault.delay_s)
        if fault.prefill:
            self._load.burst(4)
            await asyncio.sleep(0.1)
        mark = self._injector.strike_next(fault, next_epoch)
        try:
            struck = await asyncio.to_thread(self._injector.strike, fault, world, spare)
        except psutil.NoSuchProcess:
            self._note(f"fault {fault.number}: its target was gone already")
            struck = Struck([], [])
        if not struck.injections:
            self._note(f"fault {fault.number} did not come about: {fault.label}")
            self._injector.clear()
            return
        history = self._leg.history
        for injection in struck.injections:
            injection.spare_parked = spare is not None
        history.injections += struck.injections
        self._say(f"fault {fault.number}: {fault.label} (world {world['epoch']})")
        doomed = [struck]
        if fault.second is not None and mark is None:
            await self._wait_detected(struck)
            await asyncio.sleep(fault.second.delay_s)
            if (next_world := coming(await self._deployment.worlds())) is not None and (
                second := await asyncio.to_thread(self._injector.strike_second, fault, next_world)
            ) is not None:
                history.injections += second.injections
                doomed.append(second)
                if fault.second.target is Target.SUPERVISOR:
                    await self._start_again(fault)
        expects = struck.injections[0].expects
        if expects is Expects.NOTHING:
            await asyncio.sleep(CALM_S)
        elif expects is Expects.NEW_SUPERVISOR:
            await self._start_again(fault)
        elif expects is Expects.NEW_FRONT:
            await self._wait_front(struck.injections[0].at)
        else:
            await self._wait_settled(struck)
            if mark is not None and (late := self._injector.happened(fault, mark, next_epoch)) is not None:
                history.injections.append(late)
                await self._wait_settled(Struck([late], []))
            for hit in doomed:
                await self._look_for_leftovers(hit, world)
        self._injector.clear()
        if not await self._load.wait_flowing(time.time(), FLOWS_S):
            self._note(f"fault {fault.number}: nothing reached any client for {FLOWS_S:.0f} s after it")

    async def _wait_ready(self, fault: Fault) -> tuple[Table | None, Table | None, int]:
        """The world that serves, the spare if it is parked, and the epoch of the next world. Waits for a parked
        spare where the fault asks for one."""
        give_up_at = time.monotonic() + READY_S
        wants_spare = self._shape.spare != "none" and fault.spare_parked
        world = spare = None
        while time.monotonic() < give_up_at and not self._deployment.has_ended:
            worlds = await self._deployment.worlds()
            world, spare = active(worlds), spare_of(worlds)
            parked = spare if spare is not None and is_parked(spare) else None
            if world is not None and (parked is not None or not wants_spare):
                return world, parked, (spare or world)["epoch"] + (spare is None)
            await asyncio.sleep(POLL_S)
        return world, None, (world or {"epoch": 0})["epoch"] + 1

    async def _wait_detected(self, struck: Struck) -> None:
        await self._wait_known(struck)

    async def _wait_settled(self, struck: Struck) -> None:
        """Until each fault is known and nothing waits for a world any more."""
        await self._wait_known(struck)
        give_up_at = time.monotonic() + BOUNDS.recover_s
        while time.monotonic() < give_up_at and not self._deployment.has_ended:
            lost = max((d.at for d in self._deployment.detections() if not _is_aside(d)), default=0.0)
            recovered = max((recovery.at for recovery in self._deployment.recoveries()), default=0.0)
            if recovered >= lost and active(await self._deployment.worlds()) is not None:
                return
            await asyncio.sleep(POLL_S)

    async def _wait_known(self, struck: Struck) -> None:
        """Until the supervisor has found a fault in each world that was hit."""
        epochs = {injection.epoch for injection in struck.injections if injection.epoch is not None}
        give_up_at = time.monotonic() + BOUNDS.detect_s
        while time.monotonic() < give_up_at and not self._deployment.has_ended:
            known = {
                event.epoch
                for event in self._deployment.log()
                if event.name in ("world fault", "spare fault")
            }
            if epochs <= known:
                return
            await asyncio.sleep(POLL_S)

    async def _start_again(self, fault: Fault) -> None:
        await asyncio.sleep(fault.delay_s)  # meanwhile nobody watches
        await self._deployment.start_again()
        self._injector.served = self._deployment.served

    async def _wait_front(self, since: float) -> None:
        """Until another front is there and linked to the world."""
        give_up_at = time.monotonic() + BOUNDS.recover_s
        while time.monotonic() < give_up_at and not self._deployment.has_ended:
            ended = any(event.name == "front ended" for event in self._deployment.log(since))
            if ended and active(await self._deployment.worlds()) is not None:
                return
            await asyncio.sleep(POLL_S)

    async def _look_for_leftovers(self, struck: Struck, world: Table) -> None:
        """A dead world is gone before the next one serves; a dead spare within seconds."""
        for epoch, injections in itertools.groupby(struck.injections, lambda injection: injection.epoch):
            if epoch is None:
                continue
            served_before = epoch == world["epoch"] and not next(iter(injections)).target.startswith("spare")
            gateway = world["gateway"] if epoch == world["epoch"] else None
            self._leg.history.leftovers += await leftovers_of_world(
                self._deployment.served,
                epoch,
                struck.doomed,
                gateway,
                0.0 if served_before and len(struck.injections) == 1 else GONE_WITHIN_S,
            )

    # ----------------------------------------------------------------- what is kept

    def _take_log(self) -> None:
        self._leg.history.detections = self._deployment.detections()
        self._leg.history.recoveries = self._deployment.recoveries()

    def _save(self) -> None:
        """The leg as it stands; requests under way are left out, so that it can end here."""
        self._take_log()
        under_way = {id(request) for request in self._load.in_flight}
        kept = [
            request
            for request in self._load.requests
            if id(request) not in under_way
            and (request.ends or request.error or request.refused or request.left_at)
        ]
        history = (
            self._leg.history
            if self._leg.ended_at
            else msgspec.structs.replace(self._leg.history, requests=kept)
        )
        self._leg.violations = check(history, self._oracle, self._bounds)
        temporary = self._file.with_suffix(".new")
        temporary.write_bytes(msgspec.json.encode(msgspec.structs.replace(self._leg, history=history)))
        temporary.rename(self._file)

    def _report_violations(self) -> None:
        for violation in self._leg.violations:
            key = f"{violation.rule.value} {violation.request} {violation.detail}"
            if key not in self._checked:
                self._checked.add(key)
                self._say(f"VIOLATION {key}")

    def _note(self, text: str) -> None:
        self._leg.notes.append(text)
        self._say(text)

    def _say(self, text: str) -> None:
        moment = time.strftime("%H:%M:%S")
        print(f"{moment} {self._file.stem} {self._shape.name}: {text}", file=sys.stderr, flush=True)

    def _keep_logs(self, scratch: Path) -> None:
        folder = self._plan.folder / f"{self._file.stem}-logs"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(
            scratch,
            folder,
            ignore=shutil.ignore_patterns("*.sock", "tmp", "lock", "*.progress"),
            dirs_exist_ok=True,
        )
