"""When a guard has to end for want of a supervisor, and when the supervisor may count on it."""

from __future__ import annotations

import pytest

from launcher import world_records
from launcher.guard_messages import GuardHello
from launcher.leases import (
    ADOPTION_WAIT_S,
    ADOPTION_WAIT_VARIABLE,
    LEASE_S,
    LONGEST_LEASE_S,
    AnswerDelays,
    Tether,
    adoption_wait_s,
    lease_s,
)
from launcher.processes import host_id
from launcher.world_records import RankWatch


def test_wait_of_a_deployment() -> None:
    assert adoption_wait_s({}) == ADOPTION_WAIT_S == 60.0
    assert adoption_wait_s({ADOPTION_WAIT_VARIABLE: "2.5"}) == 2.5
    for wrong in ("", "soon", "0", "-1"):
        assert adoption_wait_s({ADOPTION_WAIT_VARIABLE: wrong}) == ADOPTION_WAIT_S


def test_supervisor_of_this_host() -> None:
    tether = Tether(60.0, now=0.0)
    tether.on_held()
    assert tether.left_s(1e9) > 0 and not tether.is_waiting
    tether.on_gone(100.0)
    tether.on_gone(130.0)
    assert tether.is_waiting and tether.left_s(159.0) == 1.0
    tether.on_held()
    assert tether.left_s(1e9) > 0


def test_silence_ends_the_lease() -> None:
    tether = Tether(60.0, now=0.0)
    assert tether.left_s(59.0) == 1.0, "the first supervisor has to be met within the wait"
    tether.on_lease(beat_sent_at=10.0)
    assert tether.left_s(10.0) == pytest.approx(LEASE_S)
    tether.on_lease(beat_sent_at=10.05)
    assert tether.left_s(10.05) == pytest.approx(LEASE_S)
    assert tether.left_s(10.06 + LEASE_S) < 0


def test_answer_that_was_long_on_its_way_prolongs_nothing() -> None:
    tether = Tether(60.0, now=0.0)
    tether.on_lease(beat_sent_at=10.0)
    tether.on_lease(beat_sent_at=9.0)  # overtaken by the newer one
    assert tether.left_s(10.0) == pytest.approx(LEASE_S)
    assert tether.left_s(11.0) < 0, "arriving late, the same answer gives no new time"


def test_closed_connection_begins_the_wait_and_a_new_lease_ends_it() -> None:
    tether = Tether(60.0, now=0.0)
    tether.on_lease(beat_sent_at=10.0)
    tether.on_gone(10.5)
    assert tether.is_waiting and tether.left_s(40.5) == pytest.approx(30.0)
    tether.on_lease(beat_sent_at=41.0)
    assert not tether.is_waiting and tether.left_s(41.0) == pytest.approx(LEASE_S)


@pytest.mark.parametrize("remote", [False, True])
def test_fence_is_behind_every_lease(remote: bool) -> None:
    where = "elsewhere/1" if remote else host_id()
    watch = RankWatch(GuardHello(1, 1, "n2", where, 10, 11, 12, 13), b"id", last_beat_at=100.0)
    tether = Tether(60.0, now=0.0)
    tether.on_lease(beat_sent_at=100.0)  # it cannot have been sent later than it was received
    assert watch.is_fenced(100.5) != remote
    lease_ends_at = 100.0 + tether.left_s(100.0)
    assert watch.is_fenced(lease_ends_at) != remote
    assert watch.is_fenced(lease_ends_at + 0.3)
    watch.acknowledged = True
    assert watch.is_fenced(100.0)


def watch_elsewhere() -> RankWatch:
    return RankWatch(GuardHello(1, 1, "n2", "elsewhere/1", 10, 11, 12, 13), b"id", last_beat_at=0.0)


def test_lease_grows_with_what_was_late_lately() -> None:
    delays = AnswerDelays()
    delays.on_answer(10.0, 0.05, 10.01)
    delays.on_answer(10.05, 0.05, 10.06)
    assert lease_s(delays.longest_s) == LEASE_S, "nothing was late"
    delays.on_answer(10.1, 0.05, 10.6)  # sent 0.5 s before its answer came: 0.55 s without a newer one
    assert delays.longest_s == pytest.approx(0.5)
    assert lease_s(delays.longest_s) == pytest.approx(4 * 0.5)
    assert lease_s(60.0) == LONGEST_LEASE_S
    delays.on_gone()
    delays.on_answer(40.0, 0.05, 40.01)
    assert delays.longest_s == pytest.approx(0.5), "a wait for the next supervisor is no delay"
    for minute in range(1, 4):
        delays.on_gone()
        delays.on_answer(40.0 + 61.0 * minute, 0.05, 40.01 + 61.0 * minute)
        delays.on_answer(40.05 + 61.0 * minute, 0.05, 40.06 + 61.0 * minute)
    assert delays.longest_s < 0.02, "what is long past says nothing"


def test_fence_is_behind_the_longest_lease_that_may_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later, shorter lease may be lost on its way: the guard then has the longer one."""
    clock = 100.0
    monkeypatch.setattr(world_records.time, "monotonic", lambda: clock)
    watch, tether = watch_elsewhere(), Tether(60.0, now=0.0)
    for sent_at, delay_s in ((99.98, 0.9), (100.98, 0.0), (101.98, 0.0)):
        clock = sent_at + 0.02
        watch.last_beat_at = clock - 0.01  # the turn began before the beat was read
        granted_s = watch.lease(delay_s)
        if delay_s:
            tether.on_lease(sent_at, granted_s)
    assert granted_s == LEASE_S
    ends_at = clock + tether.left_s(clock)
    assert ends_at == pytest.approx(99.98 + 3.6)
    assert not watch.is_fenced(ends_at + 0.5), "the guard may be late itself, where it is crowded"
    assert watch.is_fenced(ends_at + 1.0)


def test_lease_that_was_lengthened_is_not_shortened_by_a_newer_one() -> None:
    tether = Tether(60.0, now=0.0)
    tether.on_lease(10.0, 3.0)
    tether.on_lease(10.05, LEASE_S)
    assert tether.left_s(10.05) == pytest.approx(2.95)
