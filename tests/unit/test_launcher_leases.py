"""When a guard has to end for want of a supervisor, and when the supervisor may count on it."""

from __future__ import annotations

import pytest

from launcher.guard_messages import GuardHello
from launcher.leases import ADOPTION_WAIT_S, ADOPTION_WAIT_VARIABLE, LEASE_S, Tether, adoption_wait_s
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
