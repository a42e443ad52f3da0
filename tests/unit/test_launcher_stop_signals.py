"""What counts as one wish to stop, and what as two."""

from __future__ import annotations

import os
import signal

import pytest

from launcher import stop_signals
from launcher.stop_signals import StopSignals

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.mark.parametrize(
    ("sent", "count"),
    [([INT, INT], 1), ([TERM, TERM], 1), ([HUP, TERM], 1), ([TERM, HUP, TERM], 1)],
)
def test_one_that_comes_twice(sent: list[signal.Signals], count: int) -> None:
    """From the terminal and from a wrapper; from timeout(1), first to its child and then to its group."""
    with StopSignals() as stop:
        for number in sent:
            os.kill(os.getpid(), number)
        assert stop.count == count
        stop.count = 0  # this process goes on


def test_ctrl_c_pressed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(stop_signals.time, "monotonic", lambda: now)
    with StopSignals() as stop:
        os.kill(os.getpid(), TERM)
        now += 0.15
        os.kill(os.getpid(), TERM)
        assert stop.count == 1
        os.kill(os.getpid(), INT)
        assert stop.count == 2
        now += 1.0
        os.kill(os.getpid(), TERM)
        assert stop.count == 3
        stop.count = 0


def test_after_a_wish_to_stop_more_of_them_do_nothing() -> None:
    before = signal.getsignal(TERM)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), TERM)
            assert stop.requested()
        os.kill(os.getpid(), TERM)
    finally:
        for number in (INT, TERM, HUP):
            signal.signal(number, signal.default_int_handler if number == INT else signal.SIG_DFL)
    assert before == signal.getsignal(TERM)


def test_without_one_everything_is_as_before() -> None:
    before = [signal.getsignal(number) for number in (INT, TERM, HUP)]
    with StopSignals():
        pass
    assert [signal.getsignal(number) for number in (INT, TERM, HUP)] == before
