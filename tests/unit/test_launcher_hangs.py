"""When a rank hangs and when it is only slow, by readings of its page over hours that pass at once."""

from __future__ import annotations

from launcher.hangs import (
    FIRST_STEP_S,
    HUNG_AFTER_AT_LEAST_S,
    REMEMBERED_S,
    SCALED_AT_MOST_S,
    TIMES_PREDICTED,
    HangWatch,
)
from launcher.watch import Phase, Progress

TICK_S = 0.05


class Rank:
    """Writes to a page that a watch reads every 50 ms."""

    def __init__(self) -> None:
        self.watch = HangWatch()
        self.now = 1000.0
        self.phase = Phase.IDLE
        self.number = 0
        self.num_tokens = 1
        self.collective = 0
        self.written_at = self.now

    def step(self, silence_s: float, num_tokens: int = 1, collectives: int = 3) -> float | None:
        """A step that is silent for so long before each of its collectives. The first silence that was called
        a hang, if one was."""
        self.phase = Phase.STEPPING
        self.number += 1
        self.num_tokens = num_tokens
        for self.collective in range(collectives):
            self.written_at = self.now
            if hung_s := self.be_silent(silence_s):
                return hung_s
        return None

    def rest(self, seconds: float) -> float | None:
        self.phase = Phase.IDLE
        self.written_at = self.now
        return self.be_silent(seconds)

    def be_silent(self, seconds: float, late_s: float = 0.0) -> float | None:
        ends = self.now + seconds
        while self.now < ends:
            self.now += TICK_S + late_s
            age_s = self.now - self.written_at
            progress = Progress(
                self.phase, self.number, self.num_tokens, self.collective, age_s, 0, 0, 0, None
            )
            if (hung_s := self.watch.check(progress, self.now, late_s)) is not None:
                return hung_s
        return None


def seasoned(silence_s: float = 0.1, num_tokens: int = 1) -> Rank:
    """A rank with some steps behind it."""
    rank = Rank()
    for _ in range(10):
        assert rank.step(silence_s, num_tokens) is None
    return rank


def test_silence_in_a_step_is_a_hang() -> None:
    hung_s = seasoned().step(60.0)
    assert hung_s is not None and HUNG_AFTER_AT_LEAST_S < hung_s < HUNG_AFTER_AT_LEAST_S + 0.2


def test_waiting_for_work_is_progress() -> None:
    rank = seasoned()
    assert rank.rest(3600.0) is None
    assert rank.step(0.1) is None


def test_other_phases_are_not_judged() -> None:
    for phase in (Phase.JOINING, Phase.LOADING, Phase.PARKED, Phase.STOPPING):
        rank = Rank()
        rank.phase = phase
        assert rank.be_silent(600.0) is None


def test_slow_machine_gets_ten_times_what_its_steps_take() -> None:
    rank = seasoned(silence_s=2.0)
    assert rank.step(0.9 * TIMES_PREDICTED * 2.0) is None
    assert seasoned(silence_s=2.0).step(1.2 * TIMES_PREDICTED * 2.0) is not None


def test_first_step_may_take_long() -> None:
    rank = Rank()
    assert rank.step(0.9 * FIRST_STEP_S, num_tokens=1024) is None
    assert Rank().step(1.1 * FIRST_STEP_S) is not None


def test_first_long_prompt_may_take_long() -> None:
    """Decoding alone says little of prefill: a thousand tokens are granted up to a thousand times as much."""
    rank = seasoned(silence_s=0.05)
    assert rank.step(30.0, num_tokens=1024, collectives=2) is None
    assert seasoned(silence_s=1.0).watch.limit_s(2**20) == TIMES_PREDICTED * SCALED_AT_MOST_S


def test_long_prompts_that_were_seen_are_judged_by_their_kind() -> None:
    rank = seasoned(silence_s=1.0, num_tokens=1024)
    for _ in range(10):
        rank.step(0.05, num_tokens=1)
    assert rank.watch.limit_s(1024) < 1.5 * TIMES_PREDICTED
    assert rank.watch.limit_s(1) == HUNG_AFTER_AT_LEAST_S


def test_old_silences_are_forgotten() -> None:
    rank = seasoned(silence_s=2.0)
    for _ in range(2):
        rank.rest(REMEMBERED_S + 1)
        rank.step(0.1)
        rank.step(0.1)
    assert rank.watch.limit_s(1) == HUNG_AFTER_AT_LEAST_S


def test_lateness_of_the_watcher_is_not_held_against_the_rank() -> None:
    rank = seasoned()
    rank.phase, rank.written_at, rank.number = Phase.STEPPING, rank.now, rank.number + 1
    assert rank.be_silent(20.0, late_s=1.0) is None
    assert rank.be_silent(10.0) is not None
