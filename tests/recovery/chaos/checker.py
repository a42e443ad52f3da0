"""The checker: given the history of one deployment and the oracle, every way in which the promise was broken.

Pure: it reads no file, asks no clock, starts nothing. Used by the campaign after each fault, and tested with
histories that it must reject.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from enum import Enum

from msgspec import Struct

from tests.recovery.chaos.history import (
    Delivery,
    Detection,
    Expected,
    Expects,
    History,
    Injection,
    Oracle,
    Request,
)

MARGIN = 1e-3
"""Where the oracle itself was this close to another token, float32 sums in another order may choose that one."""
CLOCK_S = 0.05
"""The supervisor writes times in whole milliseconds, and clients are scheduled after what they wait for."""

POISONED_AFTER = 3
"""Worlds that have to die with a request before it is given up."""


class Rule(Enum):
    """What can be broken."""

    LOST = "tokens lost"
    REPEATED = "tokens repeated"
    CHANGED = "changed after delivery"
    DIFFERS = "differs from the undisturbed run"
    UNFINISHED = "never finished"
    FAILED = "failed"
    REFUSED = "refused"
    WRONG_END = "wrong end"
    AFTER_END = "goes on after its end"
    MISCOUNTED = "wrong count of tokens"
    BACK_IN_TIME = "times out of order"
    OUTAGE = "silent for too long"
    UNDETECTED = "fault not detected"
    UNRECOVERED = "fault not recovered"
    FALSE_ALARM = "false alarm"
    LEFTOVER = "left behind"
    GAVE_UP = "gave up"


class Violation(Struct, frozen=True):
    """One broken rule."""

    rule: Rule
    detail: str
    at: float | None = None
    request: str | None = None


class Bounds(Struct, frozen=True):
    """How long things may take before they count as broken, in seconds. Targets are another matter: these only
    separate slow from never."""

    silence_s: float
    """Of one choice, from its request to its end."""
    detect_s: float
    recover_s: float
    exact: bool = False
    """Whether the oracle has to be met bit for bit: no margin excuses a difference."""


def check(history: History, oracle: Oracle, bounds: Bounds) -> list[Violation]:
    """All violations, in no particular order; an empty list is the proof. Raises KeyError for a case that the oracle
    does not know."""
    found = [Violation(Rule.LEFTOVER, leftover.what, leftover.at) for leftover in history.leftovers]
    if history.died is not None:
        found.append(Violation(Rule.GAVE_UP, history.died))
    found += _check_faults(history, bounds)
    for request in history.requests:
        found += check_request(request, oracle[request.case], history, bounds)
    return found


def check_request(
    request: Request, expected: list[Expected], history: History, bounds: Bounds
) -> Iterator[Violation]:
    """Violations of one request; of the history it reads only what excuses a refusal."""
    for rule, at, detail in _check_request(request, expected, history, bounds):
        yield Violation(rule, f"{request.case}: {detail}", at, request.name)


Finding = tuple[Rule, float | None, str]


def _check_request(
    request: Request, expected: list[Expected], history: History, bounds: Bounds
) -> Iterator[Finding]:
    if request.refused is not None:
        if request.accepted_at is not None or request.deliveries:
            yield Rule.FAILED, request.sent_at, f"refused after it was accepted: {request.refused}"
        elif not _excuses_refusal(history, request.sent_at, bounds):
            yield Rule.REFUSED, request.sent_at, request.refused
        return
    given_up = was_given_up(request, history)
    if request.error is not None and request.left_at is None and not given_up:
        yield Rule.FAILED, request.sent_at, request.error
    known = range(len(expected))
    named = {delivery.choice for delivery in request.deliveries} | {end.choice for end in request.ends}
    for choice in named.difference(known):
        yield Rule.CHANGED, None, f"choice {choice} was never asked for"
    any_parted = False
    for choice in known:
        deliveries = [delivery for delivery in request.deliveries if delivery.choice == choice]
        whole, problems = _assemble(deliveries)
        yield from problems
        parted, problems = _compare(whole, expected[choice], bounds)
        yield from problems
        any_parted |= parted
        yield from _check_end(request, choice, whole, expected[choice], parted)
        yield from _check_times(request, choice, bounds)
    is_whole = {end.choice for end in request.ends} >= set(known)
    if request.completion_tokens is not None and is_whole and not any_parted:
        total = sum(len(choice.token_ids) for choice in expected)
        if request.completion_tokens != total:
            yield Rule.MISCOUNTED, None, f"{request.completion_tokens} tokens instead of {total}"


def _assemble(deliveries: list[Delivery]) -> tuple[list[int] | str, list[Finding]]:
    """The whole of one choice, put together by position, and what was wrong with the positions."""
    whole: list[int] | str = deliveries[0].content[:0] if deliveries else ""
    found: list[Finding] = []
    for delivery in deliveries:
        content = delivery.content
        if type(content) is not type(whole):
            found.append((Rule.CHANGED, delivery.at, "text and token ids in one stream"))
            break
        if delivery.position > len(whole):
            gap = f"{len(whole)} to {delivery.position - 1}"
            found.append((Rule.LOST, delivery.at, f"choice {delivery.choice}: positions {gap}"))
            break  # every later position is off
        overlap = len(whole) - delivery.position
        if overlap:
            before = whole[delivery.position : delivery.position + len(content)]
            same = content[: len(before)] == before
            rule = Rule.REPEATED if same else Rule.CHANGED
            if not same or before:
                found.append((rule, delivery.at, f"choice {delivery.choice}: position {delivery.position}"))
        whole = whole + content[overlap:]  # type: ignore[operator]
    return whole, found


def _compare(whole: list[int] | str, expected: Expected, bounds: Bounds) -> tuple[bool, list[Finding]]:
    """Whether the choice parted from the oracle, and the finding if that was not allowed where it happened."""
    wanted: list[int] | str = expected.text if isinstance(whole, str) else expected.token_ids
    shared = min(len(whole), len(wanted))
    at = next((index for index in range(shared) if whole[index] != wanted[index]), shared)
    if at == len(whole):
        return False, []  # right as far as it goes; whether it is whole is the end's business
    token = _token_of(at, expected) if isinstance(whole, str) else at
    # Text that is the same may come from another split into tokens: the token before counts, too.
    first = max(0, token - 1) if isinstance(whole, str) else token
    margin = min(expected.margins[first : token + 1], default=1.0)
    if margin < MARGIN and not bounds.exact:
        return True, []
    got, instead = whole[at : at + 12], wanted[at : at + 12]
    detail = f"at token {token}, where the margin is {margin:.2g}: {got!r} for {instead!r}"
    return True, [(Rule.DIFFERS, None, detail)]


def _token_of(character: int, expected: Expected) -> int:
    """The token that brings this character of the text; the last one for what lies behind the text."""
    ends = expected.text_ends
    return next((index for index, end in enumerate(ends) if end > character), max(0, len(ends) - 1))


def _check_end(
    request: Request, choice: int, whole: list[int] | str, expected: Expected, parted: bool
) -> Iterator[Finding]:
    ends = [end for end in request.ends if end.choice == choice]
    if not ends:
        if request.left_at is None and request.error is None:
            yield Rule.UNFINISHED, request.sent_at, f"choice {choice} has no end after {len(whole)} units"
        return
    if len(ends) > 1:
        yield Rule.AFTER_END, ends[1].at, f"choice {choice} ends {len(ends)} times"
    last = max((d.at for d in request.deliveries if d.choice == choice), default=None)
    if last is not None and last > ends[0].at:
        yield Rule.AFTER_END, last, f"choice {choice} brings something after its end"
    if parted:
        return
    if ends[0].reason != expected.finish_reason:
        yield Rule.WRONG_END, ends[0].at, f"{ends[0].reason!r} for {expected.finish_reason!r}"
    wanted = len(expected.text if isinstance(whole, str) else expected.token_ids)
    if isinstance(whole, str) and not request.deliveries and not expected.text:
        return
    if len(whole) < wanted:
        yield Rule.LOST, ends[0].at, f"choice {choice} ends after {len(whole)} of {wanted} units"


def _check_times(request: Request, choice: int, bounds: Bounds) -> Iterator[Finding]:
    moments = [request.sent_at]
    moments += [delivery.at for delivery in request.deliveries if delivery.choice == choice]
    moments += [end.at for end in request.ends if end.choice == choice][:1]
    for before, after in itertools.pairwise(moments):
        if after < before:
            yield Rule.BACK_IN_TIME, after, f"choice {choice}: {before - after:.3f} s"
        if after - before > bounds.silence_s:
            yield Rule.OUTAGE, before, f"choice {choice}: {after - before:.1f} s without a word"


def was_given_up(request: Request, history: History) -> bool:
    """Whether it ended as the one suspect of so many worlds' deaths. Here all of them were put in, and none was its
    doing; but that is what is promised of a request that so many worlds die with, the last time alone."""
    if request.error is None or "poisoned" not in request.error or request.error_at is None:
        return False
    began, ended = request.sent_at, request.error_at
    hits = {
        i.epoch for i in history.injections if i.expects is Expects.WORLD_FAULT and began <= i.at <= ended
    }
    return len(hits) >= POISONED_AFTER


def _excuses_refusal(history: History, at: float, bounds: Bounds) -> bool:
    """Whether something was going on that allows new requests to be refused."""
    for injection in history.injections:
        refuses = injection.expects in (Expects.ANYTHING, Expects.NEW_FRONT, Expects.NEW_SUPERVISOR)
        until = (injection.until or injection.at) + bounds.recover_s
        if refuses and injection.at - CLOCK_S <= at <= until:
            return True
    return False


# --------------------------------------------------------------------------- faults


def _check_faults(history: History, bounds: Bounds) -> Iterator[Violation]:
    explained: set[int] = set()
    for injection in history.injections:
        causes = [
            index
            for index, detection in enumerate(history.detections)
            if _explains(injection, detection, bounds)
        ]
        explained.update(causes)
        what = f"fault {injection.number}: {injection.kind} of {injection.target}"
        if injection.expects is Expects.WORLD_FAULT:
            # Of two faults in one world only the first can be detected.
            if not any(_is_of(injection, detection, bounds) for detection in history.detections):
                yield Violation(Rule.UNDETECTED, what, injection.at)
            elif not any(history.detections[index].spare for index in causes) and causes:
                yield from _check_recovery(history, history.detections[causes[0]], what, bounds)
        elif injection.expects in (Expects.NEW_FRONT, Expects.NEW_SUPERVISOR) and not causes:
            yield Violation(Rule.UNDETECTED, what, injection.at)
    for index, detection in enumerate(history.detections):
        if index not in explained:
            what = f"{detection.kind} in world {detection.epoch}: {detection.detail}"
            yield Violation(Rule.FALSE_ALARM, what, detection.at)


def _is_of(injection: Injection, detection: Detection, bounds: Bounds) -> bool:
    """Whether a detection ends the world that this fault hit, be it for an earlier fault."""
    in_time = detection.at <= injection.at + bounds.detect_s
    return in_time and detection.epoch is not None and detection.epoch == injection.epoch


def _explains(injection: Injection, detection: Detection, bounds: Bounds) -> bool:
    """Whether the fault can be the cause of what was detected."""
    if detection.at < injection.at - CLOCK_S:
        return False
    if injection.expects is Expects.NOTHING:
        return False
    if injection.expects is Expects.ANYTHING:
        return detection.at <= (injection.until or injection.at) + bounds.recover_s
    if detection.at > injection.at + bounds.detect_s:
        return False
    if injection.expects is Expects.NEW_FRONT:
        return detection.kind == "front"
    if injection.expects is Expects.NEW_SUPERVISOR:
        return detection.kind == "supervisor"
    return detection.epoch is not None and detection.epoch == injection.epoch


def _check_recovery(history: History, detection: Detection, what: str, bounds: Bounds) -> Iterator[Violation]:
    later = [recovery.at for recovery in history.recoveries if recovery.at >= detection.at]
    if not later:
        yield Violation(Rule.UNRECOVERED, what, detection.at)
    elif min(later) - detection.at > bounds.recover_s:
        yield Violation(
            Rule.UNRECOVERED, f"{what}: only after {min(later) - detection.at:.1f} s", detection.at
        )
