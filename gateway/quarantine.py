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

With several fronts, one at a time has the world for its trials (world_claim.py): the others take their requests out
of it meanwhile. What died where another front did not leave in time says nothing about who was on trial.
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
from gateway.world_claim import WorldClaim

SUSPECT_CRASHES = 2
ROUND_S = 5.0
"""How long one round of trials lets the others wait; the trial that is under way then is finished."""
REST_S = 5.0
"""How long the others run at least before the next round."""
CLAIM_WAIT_S = 5.0
"""For other fronts to leave the world to this one; then its suspects have their turn beside them."""
ASIDE_S = 60.0
"""How long the requests of this front wait at most for the trials of another front."""
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

    def __init__(
        self,
        floor: Floor,
        journal: Journal,
        metrics: FrontMetrics,
        log: Logger,
        claim: WorldClaim | None = None,
    ) -> None:
        """`claim`: with other fronts; None: this is the only one."""
        self._claim = claim or WorldClaim()
        self._epoch: int | None = None
        """Of the world that serves."""
        self._in_round = False
        self._may_try = False
        """The others have left the world to this front's round, or were waited for long enough."""
        self._stands_aside = False
        """Another front has the world for itself."""
        self._ignored: int | None = None
        """Epoch of a world in which another front's round was waited for long enough."""
        self._claim_timer: asyncio.TimerHandle | None = None
        """For the others to leave; or, standing aside, for the other one's end."""
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
        self._fallen: tuple[int, list[Request], _Trial | None, bool] | None = None
        """The world that went down last, before it is known why: its epoch, who was in flight, the trial, and whether
        the world was this front's alone."""

    @property
    def holds(self) -> bool:
        """Only the requests on trial may be in the world, of this front or of another; everybody else waits."""
        return self._in_round or self._stands_aside

    # ----------------------------------------------------------------------- worlds come and go

    def world_up(self, epoch: int, live: Iterable[Request]) -> None:
        """A world serves. Unless `holds` after this, everybody who is no suspect may be submitted."""
        self._fallen = None  # no fault was told of it: the connection was lost, or the change was planned
        self._epoch = epoch
        self._stands_aside = self._other_has_it()
        if self._stands_aside:
            self._begin_aside(epoch)
        suspects = sorted(filter(is_suspect, live), key=context_tokens)
        self._groups = [[request for request in group if request in suspects] for group in self._groups]
        self._groups = [group for group in self._groups if group]
        known = {request.request_id for group in self._groups for request in group}
        self._groups += _grouped([request for request in suspects if request.request_id not in known])
        if self._groups:
            self._log.warning("quarantine", epoch=epoch, suspects=len(suspects), groups=len(self._groups))
            self._begin_round()
            self._next()
        else:
            self._claim.want(None)

    def world_down(self, epoch: int, in_flight: list[Request]) -> None:
        """No world serves; `judge` says later what that meant."""
        self._fallen = (epoch, in_flight, self._trial, self._claim.is_alone)
        if self._trial is not None:
            self._groups.insert(0, self._trial.left)
        self._trial = None
        self._leaving.clear()
        self._epoch = None
        self._in_round = self._stands_aside = False
        self._stop_claim_timer()  # the claim stays: others must not come back into a world that is dead
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def judge(self, faults: Iterable[Fault]) -> None:
        """Counts a crash for everybody who was in flight, once it is known that the world died of one."""
        if self._fallen is None:
            return
        epoch, in_flight, trial, was_alone = self._fallen
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
        if not was_alone:
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
            if self._stands_aside:
                self._say_out()
            elif self._trial is None:
                self._next()

    # ----------------------------------------------------------------------- other fronts

    def note_claims(self) -> None:
        """The supervisor has said whose turn it is; maybe the same as before."""
        other_has_it = self._other_has_it()
        if other_has_it and not self._stands_aside:
            self._stand_aside()
        elif not other_has_it and self._stands_aside:
            self._step_back()
        if not self._stands_aside:
            self._say_out()
        if self._in_round and not self._may_try and self._claim.is_alone:
            self._stop_claim_timer()
            self._may_try = True
            self._round_began = time.monotonic()
            self._next()

    def _other_has_it(self) -> bool:
        other = self._claim.of_other
        return other is not None and other == self._epoch and other != self._ignored

    def _stand_aside(self) -> None:
        assert self._epoch is not None
        self._stands_aside = True
        if self._trial is not None:  # the supervisor has changed, and gives the turn to another one first
            self._groups.insert(0, self._trial.left)
            self._trial = None
        self._floor.withdraw_all()
        self._begin_aside(self._epoch)

    def _begin_aside(self, epoch: int) -> None:
        self._stop_claim_timer()
        self._may_try = False

        def enough() -> None:
            self._log.error("another front's trials do not end; going on", epoch=epoch)
            self._ignored = epoch
            self._step_back()

        self._claim_timer = asyncio.get_running_loop().call_later(ASIDE_S, enough)
        self._say_out()

    def _step_back(self) -> None:
        """The other one is done. Those who wait have their turn, or the own round, which waited, too."""
        self._stands_aside = False
        self._stop_claim_timer()
        self._say_out()
        if self._in_round:
            self._wait_for_claim()
        else:
            self._leaving.clear()
            self._floor.open()

    def _say_out(self) -> None:
        """Whether this front has nothing in a world that another one wants for itself."""
        other = self._claim.of_other
        is_out = other != self._ignored and (
            other != self._epoch or (self._stands_aside and not self._leaving)
        )
        self._claim.leave_to_other(other if is_out else None)

    def _wait_for_claim(self) -> None:
        """Until this front has the world for itself; not for ever, since others may be frozen."""
        self._may_try = self._claim.is_alone
        if self._may_try or self._stands_aside:
            return
        self._stop_claim_timer()

        def enough() -> None:
            self._log.error("other fronts do not leave the world; suspects are tried beside them")
            self._may_try = True
            self._round_began = time.monotonic()
            self._next()

        self._claim_timer = asyncio.get_running_loop().call_later(CLAIM_WAIT_S, enough)

    def _stop_claim_timer(self) -> None:
        if self._claim_timer is not None:
            self._claim_timer.cancel()
            self._claim_timer = None

    # ----------------------------------------------------------------------- inside

    def _begin_round(self) -> None:
        self._in_round = True
        self._round_began = time.monotonic()
        self._claim.want(self._epoch)
        self._wait_for_claim()

    def _round_lasts(self) -> bool:
        return time.monotonic() - self._round_began < ROUND_S

    def _next(self) -> None:
        """The next trial, once the world is empty; or the end of the round."""
        if not self._in_round or self._trial is not None:
            return
        if self._groups and not self._may_try:
            return
        if self._groups and self._round_lasts():
            if not self._leaving:
                self._trial = _Trial(self._groups.pop(0))
                for request in self._trial.members:
                    self._floor.submit(request)
            return
        self._in_round = False
        self._stop_claim_timer()
        self._claim.want(None)
        if self._groups:
            rest_s = max(REST_S, 2 * (time.monotonic() - self._round_began))
            self._timer = asyncio.get_running_loop().call_later(rest_s, self._next_round)
        if not self._stands_aside:
            self._leaving.clear()
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
