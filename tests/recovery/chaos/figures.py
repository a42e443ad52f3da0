"""From histories to figures: how long each part of a recovery took, with the targets beside it. Pure; used by the
report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import Struct

from benchmarks.common import percentile
from benchmarks.targets import TARGETS
from tests.recovery.chaos.checker import Rule, Violation, was_given_up
from tests.recovery.chaos.history import Expects, History, Injection, Request
from tests.recovery.chaos.schedule import FREEZES, HANGS, Kind, Target

CLASSES = ("kill", "exit", "freeze", "hang", "front")
PARTS = ("detected", "serving", "first token", "all streams")
_CLASSES = {
    "freeze": {kind.value for kind in FREEZES},
    "hang": {kind.value for kind in HANGS},
    "exit": {Kind.RAISE.value, Kind.OUT_OF_MEMORY.value},
}
_OF_GUARDS = {Target.GUARD.value, Target.MPIRUN.value}


class Outage(Struct, frozen=True):
    """One fault that ended a world which served, with the seconds from the fault to each part."""

    number: int
    at: float
    label: str
    fault: str
    """kill, freeze, hang or exit; front where that was killed."""
    spare: str
    """warm or hot if one stood ready; none if there was none, or it was not ready yet."""
    direct: bool
    """Whether it hit ranks, and was alone: guards and mpirun are seen in other ways, and a second fault in the
    recovery makes it longer. Targets are for these."""
    seconds: dict[str, float]
    num_streams: int
    """Streams that were under way."""
    load_average: float


class Figure(Struct, frozen=True):
    """One line of the report."""

    label: str
    count: int
    p50: float | None
    p99: float | None
    target_p50: float | None = None
    target_p99: float | None = None

    @property
    def met(self) -> bool | None:
        """None where there is no target, or nothing was measured."""
        pairs = [(self.p50, self.target_p50), (self.p99, self.target_p99)]
        known = [value <= limit for value, limit in pairs if value is not None and limit is not None]
        return all(known) if known else None


def fault_class(injection: Injection) -> str:
    if injection.expects in (Expects.NEW_FRONT, Expects.NEW_SUPERVISOR):
        return injection.target
    return next((name for name, kinds in _CLASSES.items() if injection.kind in kinds), "kill")


def outages(history: History, spare: str) -> list[Outage]:
    """One for each fault that ended the world that served."""
    spares = {detection.epoch for detection in history.detections if detection.spare}
    faults = [
        injection
        for injection in history.injections
        if injection.expects is Expects.WORLD_FAULT and injection.epoch not in spares
    ]
    fronts = (_of_front(history, injection, spare) for injection in history.injections)
    found = [outage for outage in fronts if outage is not None]
    for injection in faults:
        detected = [
            d.at for d in history.detections if d.epoch == injection.epoch and d.at >= injection.at - 0.01
        ]
        if not detected:
            continue
        served = [recovery.at for recovery in history.recoveries if recovery.at >= min(detected)]
        if not served:
            continue
        recovered = min(served)
        streams = [request for request in history.requests if _under_way(request, injection.at)]
        resumed = [at for request in streams if (at := _next_sign(request, recovered)) is not None]
        close = [
            other
            for other in faults
            if other is not injection
            and (other.number == injection.number or injection.at < other.at < max([recovered, *resumed]))
        ]
        # A front or supervisor that was killed meanwhile makes it longer, too.
        close += [o for o in history.injections if o.number == injection.number and o is not injection]
        seconds = {"detected": max(0.0, min(detected) - injection.at), "serving": recovered - injection.at}
        if resumed:
            seconds["first token"] = min(resumed) - injection.at
            seconds["all streams"] = max(resumed) - injection.at
        found.append(
            Outage(
                number=injection.number,
                at=injection.at,
                label=f"{injection.kind}: {injection.target}",
                fault=fault_class(injection),
                spare=spare if injection.spare_parked else "none",
                direct=not close and injection.target not in _OF_GUARDS,
                seconds=seconds,
                num_streams=len(resumed),
                load_average=injection.load_average,
            )
        )
    return found


def _of_front(history: History, injection: Injection, spare: str) -> Outage | None:
    """The outage by a front that was killed, while its world goes on; None for other faults."""
    if injection.expects is not Expects.NEW_FRONT:
        return None
    known = [d.at for d in history.detections if d.kind == "front" and d.at >= injection.at - 0.01]
    if not known:
        return None
    streams = [request for request in history.requests if _under_way(request, injection.at)]
    resumed = [at for request in streams if (at := _next_sign(request, min(known))) is not None]
    if not resumed:
        return None
    seconds = {
        "detected": max(0.0, min(known) - injection.at),
        "serving": min(resumed) - injection.at,
        "first token": min(resumed) - injection.at,
        "all streams": max(resumed) - injection.at,
    }
    label = f"{injection.kind}: {injection.target}"
    load = injection.load_average
    return Outage(injection.number, injection.at, label, "front", spare, True, seconds, len(resumed), load)


def _under_way(request: Request, at: float) -> bool:
    if request.accepted_at is None or request.accepted_at > at or request.error is not None:
        return False
    if request.left_at is not None:
        return False
    return bool(request.ends) and max(end.at for end in request.ends) > at


def _next_sign(request: Request, at: float) -> float | None:
    signs = [delivery.at for delivery in request.deliveries] + [end.at for end in request.ends]
    return min((sign for sign in signs if sign >= at), default=None)


def table(found: Sequence[Outage]) -> list[Figure]:
    """All figures, those with targets first."""
    figures = []
    for target in dict.fromkeys((t.fault, t.part, t.spare) for t in TARGETS):
        fault, part, spare = target
        if fault not in CLASSES or part not in PARTS:
            continue  # measured elsewhere: benchmarks/recovery.py and hosts.py
        values = _seconds(found, fault, part, spare)
        limits = {t.share: t.limit_s for t in TARGETS if (t.fault, t.part, t.spare) == target}
        label = f"{fault} to {part}" + (f", {spare}" if spare else "")
        figures.append(_figure(label, values, limits.get("p50"), limits.get("p99")))
    known = {figure.label for figure in figures}
    for fault in CLASSES:
        for part in PARTS:
            for spare in (None,) if part == "detected" or fault == "front" else ("none", "warm", "hot"):
                label = f"{fault} to {part}" + (f", {spare}" if spare else "")
                values = _seconds(found, fault, part, spare)
                if label not in known and values:
                    figures.append(_figure(label, values))
    return figures


def _seconds(found: Iterable[Outage], fault: str, part: str, spare: str | None) -> list[float]:
    return [
        outage.seconds[part]
        for outage in found
        if outage.direct
        and outage.fault == fault
        and part in outage.seconds
        and spare in (None, outage.spare)
    ]


def _figure(label: str, values: list[float], p50: float | None = None, p99: float | None = None) -> Figure:
    if not values:
        return Figure(label, 0, None, None, p50, p99)
    return Figure(label, len(values), percentile(values, 0.5), percentile(values, 0.99), p50, p99)


class Counts(Struct, frozen=True):
    """What was counted over a whole campaign."""

    faults: int
    requests: int
    units: int
    """Tokens, or characters where a client sees only those."""
    tokens_lost_or_repeated: int
    false_alarms: int
    given_up: int
    """Requests that were taken for what killed the worlds: see checker.was_given_up."""
    violations: int
    seconds: float


def counts(histories: Sequence[History], violations: Sequence[Violation], seconds: float) -> Counts:
    broken = (Rule.LOST, Rule.REPEATED, Rule.CHANGED, Rule.DIFFERS)
    return Counts(
        faults=sum(len(history.injections) for history in histories),
        requests=sum(len(history.requests) for history in histories),
        units=sum(len(d.content) for h in histories for r in h.requests for d in r.deliveries),
        tokens_lost_or_repeated=sum(violation.rule in broken for violation in violations),
        false_alarms=sum(violation.rule is Rule.FALSE_ALARM for violation in violations),
        given_up=sum(was_given_up(request, history) for history in histories for request in history.requests),
        violations=len(violations),
        seconds=seconds,
    )
