"""Requests that may be what kills worlds: counted, tried together and alone, acquitted or given up.

Used by requests.py alone. It must not punish a stream for the company it had: nothing fails that did not have a
world for itself when that world died.

The rules. A request that was in flight in two crashes is a suspect; lost nodes and planned changes of the world are
no crashes. Suspects have the world for themselves, many of them together, until each has brought a new token: then it
has got past the point where it died, and is acquitted: deaths that none of them caused cost one trial. If the world
dies meanwhile, those that have brought none are tried one by one; in halves where the death looks like a signal from
outside (SIGKILL, a stop), which is seldom theirs, but may be the kernel's that ran out of memory. If the world dies
with one alone from the beginning, that one has failed; from outside it takes two such deaths, both in a step. Trials
begin as soon as a world serves, shortest first. Others wait meanwhile, but not for more than ROUND_S and the trial
that is under way; then they run for twice as long as they waited, REST_S at least, before the next trials.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Protocol

from gateway.control_messages import Fault
from gateway.errors import RequestFailed
from gateway.journal import Journal
from gateway.live_request import Request
from gateway.log import Logger
from gateway.metrics import FrontMetrics
from gateway.replay import context_tokens

SUSPECT_CRASHES = 2
ROUND_S = 5.0
"""How long one round of trials lets the others wait; the trial that is under way then is finished."""
REST_S = 5.0
"""How long the others run at least before the next round."""
NO_CRASHES = ("lost", "planned")
"""Kinds of fault that say nothing about the requests that were there."""
FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGSTOP")
"""Deaths that a request hardly causes by itself; except that the kernel kills by SIGKILL what takes its last
memory."""


GROUP_TOKENS = 8192
"""As many tokens the requests that are tried together have to read again at most, since everybody else waits."""


class Floor(Protocol):
    """The requests around it, as requests.py holds them."""

    def submit(self, request: Request) -> None:
        """Into the world that serves."""

    def withdraw(self, request: Request) -> None:
        """Out of the world; `leaves` is called, since the world has yet to confirm it."""

    def withdraw_all(self) -> None: ...

    def open(self) -> None:
        """Everybody who is no suspect may be submitted."""

    def fail(self, request: Request, error: RequestFailed) -> None: ...


class _Trial:
    """Suspects that have the world for themselves."""

    def __init__(self, members: list[Request]) -> None:
        self.members = members
        self.left = list(members)
        """Those that have brought no token since."""


class Quarantine:
    """The trials of one front. All in its loop."""

    def __init__(self, floor: Floor, journal: Journal, metrics: FrontMetrics, log: Logger) -> None:
        self.holds = False
        """Only the requests on trial may be in the world; everybody else waits."""
        self._floor = floor
        self._journal = journal
        self._metrics = metrics
        self._log = log
        self._groups: list[list[Request]] = []
        """Suspects to be tried together; the next ones first."""
        self._trial: _Trial | None = None
        self._leaving: set[str] = set()
        """Ids in the world that were cancelled there, and may still run."""
        self._round_began = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._fallen: tuple[int, list[Request], _Trial | None] | None = None
        """The world that went down last, before it is known why: its epoch, who was in flight, and the trial."""

    # ----------------------------------------------------------------------- worlds come and go

    def world_up(self, epoch: int, live: Iterable[Request]) -> None:
        """A world serves. Unless `holds` after this, everybody who is no suspect may be submitted."""
        self._fallen = None  # no fault was told of it: the connection was lost, or the change was planned
        suspects = sorted(filter(is_suspect, live), key=context_tokens)
        self._groups = [[request for request in group if request in suspects] for group in self._groups]
        self._groups = [group for group in self._groups if group]
        known = {request.request_id for group in self._groups for request in group}
        self._groups += _grouped([request for request in suspects if request.request_id not in known])
        if self._groups:
            self._log.warning("quarantine", epoch=epoch, suspects=len(suspects), groups=len(self._groups))
            self._begin_round()
            self._next()

    def world_down(self, epoch: int, in_flight: list[Request]) -> None:
        """No world serves; `judge` says later what that meant."""
        self._fallen = (epoch, in_flight, self._trial)
        if self._trial is not None:
            self._groups.insert(0, self._trial.left)
        self._trial = None
        self._leaving.clear()
        self.holds = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def judge(self, faults: Iterable[Fault]) -> None:
        """Counts a crash for everybody who was in flight, once it is known that the world died of one."""
        if self._fallen is None:
            return
        epoch, in_flight, trial = self._fallen
        fault = next((fault for fault in faults if fault.epoch == epoch), None)
        if fault is None:
            return
        self._fallen = None
        if fault.kind in NO_CRASHES:
            return
        self._journal.add_crash([request.request_id for request in in_flight if not request.ended])
        from_outside = _is_from_outside(fault)
        if trial is None or not trial.left or (from_outside and fault.phase not in (None, "stepping")):
            return
        if len(trial.members) > 1:
            self._split(trial.left, from_outside)
            return
        [tried] = trial.left
        tried.deaths_alone += 1
        if tried.deaths_alone >= (2 if from_outside else 1):
            self._give_up(tried, fault)

    # ----------------------------------------------------------------------- what requests do

    def brought_token(self, request: Request) -> None:
        """It has a new token, and has not ended by that."""
        if self._trial is not None and request in self._trial.left:
            self._acquit(request)
            self._leave_trial(self._trial, request)

    def ended(self, request: Request) -> None:
        """It has finished, failed, or was cancelled."""
        if self._trial is not None and request in self._trial.left:
            self._leave_trial(self._trial, request)
            return
        for group in self._groups:
            if request in group:
                group.remove(request)
        self._groups = [group for group in self._groups if group]

    def leaves(self, engine_id: str) -> None:
        """It was cancelled in the world."""
        if self.holds:
            self._leaving.add(engine_id)

    def left(self, engine_id: str) -> None:
        """The world has nothing more of it."""
        if engine_id in self._leaving:
            self._leaving.remove(engine_id)
            if self._trial is None:
                self._next()

    # ----------------------------------------------------------------------- inside

    def _begin_round(self) -> None:
        self.holds = True
        self._round_began = time.monotonic()

    def _round_lasts(self) -> bool:
        return time.monotonic() - self._round_began < ROUND_S

    def _next(self) -> None:
        """The next trial, once the world is empty; or the end of the round."""
        if not self.holds or self._trial is not None:
            return
        if self._groups and self._round_lasts():
            if not self._leaving:
                self._trial = _Trial(self._groups.pop(0))
                for request in self._trial.members:
                    self._floor.submit(request)
            return
        self.holds = False
        self._leaving.clear()
        if self._groups:
            rest_s = max(REST_S, 2 * (time.monotonic() - self._round_began))
            self._timer = asyncio.get_running_loop().call_later(rest_s, self._next_round)
        self._floor.open()

    def _leave_trial(self, trial: _Trial, request: Request) -> None:
        """Whatever becomes of the others, this one is not what the world dies of now."""
        trial.left.remove(request)
        if trial.left:
            return
        self._trial = None
        if self._groups and self._round_lasts():
            for member in trial.members:
                if not member.ended:
                    self._floor.withdraw(member)  # the next ones are to be alone, too
        self._next()

    def _split(self, suspects: list[Request], from_outside: bool) -> None:
        """The world died with these together."""
        index = self._groups.index(suspects)
        size = (len(suspects) + 1) // 2 if from_outside else 1
        parts = [suspects[start : start + size] for start in range(0, len(suspects), size)]
        self._groups[index : index + 1] = parts

    def _next_round(self) -> None:
        self._timer = None
        if self._groups:
            self._begin_round()
            self._floor.withdraw_all()
            self._next()

    def _acquit(self, request: Request) -> None:
        self._journal.acquit(request.request_id)
        request.deaths_alone = 0
        self._metrics.trials["acquitted"] += 1
        self._log.info("acquitted", epoch=request.epoch, request=request.request_id)

    def _give_up(self, request: Request, fault: Fault) -> None:
        self._metrics.trials["failed"] += 1
        crashes = request.entry.crashes
        self._log.error("request given up", request=request.request_id, crashes=crashes, detail=fault.detail)
        text = (
            f"this request ran in {crashes} worlds when they died, the last time with nothing beside it, and is not "
            f"tried again; world {fault.epoch}: {fault.detail}"
        )
        self._floor.fail(request, RequestFailed("poisoned", text, request.request_id))


def _grouped(suspects: list[Request]) -> list[list[Request]]:
    """In groups that are not too large, in the same order."""
    groups: list[list[Request]] = []
    tokens = GROUP_TOKENS
    for request in suspects:
        tokens += context_tokens(request)
        if tokens > GROUP_TOKENS:
            groups.append([])
            tokens = context_tokens(request)
        groups[-1].append(request)
    return groups


def is_suspect(request: Request) -> bool:
    """Whether it may run alone only."""
    return request.entry.crashes >= SUSPECT_CRASHES


def _is_from_outside(fault: Fault) -> bool:
    return fault.kind in ("frozen", "mpirun") or fault.signal in FROM_OUTSIDE
