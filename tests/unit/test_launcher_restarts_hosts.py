"""Starts over several hosts that fail while one is cut off."""

from __future__ import annotations

from launcher.restarts import FAILED_STARTS, MAX_HOST_BACK_OFF_S, Restarts


def test_starts_go_on_for_ever_once_a_world_has_served_on_several_hosts() -> None:
    restarts = Restarts(waits_for_hosts=True)
    restarts.on_served()
    waits = [restarts.on_failed_start(now=100.0) for _ in range(50)]
    assert waits[:3] == [0.5, 1.0, 2.0] and set(waits[4:]) == {MAX_HOST_BACK_OFF_S}
    assert restarts.not_before == 100.0 + MAX_HOST_BACK_OFF_S


def test_first_starts_on_several_hosts_give_up() -> None:
    restarts = Restarts(waits_for_hosts=True)
    assert [restarts.on_failed_start(0.0) for _ in range(FAILED_STARTS)][-1] is None
