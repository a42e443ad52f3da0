"""Tells a rank that hangs inside a step from one that is slow. Used by the guard; knows only the progress page
and what it saw there before. Waiting for work, joining and loading are not its business."""

from __future__ import annotations

from launcher.watch import Phase, Progress

HUNG_AFTER_AT_LEAST_S = 3.0
"""No rank is called hung before."""
TIMES_PREDICTED = 10.0
"""A rank may be silent for so many times the longest silence that a step like this one had lately: a machine
that is shared with others, or swaps, is slow but not hung."""
FIRST_STEP_S = 120.0
"""The first step reads every weight, perhaps from a disk, and has no history."""
SCALED_AT_MOST_S = 30.0
"""A step with more tokens than any before is predicted from smaller ones in proportion, which is far too much
(one token costs nearly as much as sixteen); so the prediction stops here."""
STARVED_AT_MOST_S = 30.0
"""So much of one silence is excused where processors are scarce: a rank that spins while it hangs waits for one,
too."""
REMEMBERED_S = 300.0
"""What is older than this, or at most twice this, is forgotten."""


class HangWatch:
    """Fed with every reading of one rank's page.

    A silence is the time between two writes to the page: a rank writes at the beginning of a step and of each
    collective in it. Silences are remembered by the size of their step, in powers of two of its tokens.
    """

    def __init__(self) -> None:
        self._longest: dict[int, float] = {}
        self._longest_before: dict[int, float] = {}
        self._turned_at = 0.0
        self._stepped = False
        self._last: Progress | None = None
        self._silent_s = 0.0
        self._late_s = 0.0
        self._starved_s = 0.0

    @property
    def starved_s(self) -> float:
        """How much of the silence is excused because processors were scarce."""
        return min(self._starved_s, STARVED_AT_MOST_S)

    def check(self, progress: Progress, now: float, late_s: float, starved_s: float = 0.0) -> float | None:
        """The silence in seconds, as far as it counts, if the rank hangs, else None. `late_s`: how much later than
        planned this call comes, in which time the rank may not have run either. `starved_s`: new time in which it, or
        one that it waits for, had to wait for a processor."""
        last, self._last = self._last, progress
        if last is not None and (
            progress.age_s < last.age_s
            or (progress.phase, progress.step, progress.collective)
            != (last.phase, last.step, last.collective)
        ):
            self._remember(last, now)
            self._late_s = self._starved_s = 0.0
        self._late_s += late_s
        self._starved_s += starved_s
        self._silent_s = max(0.0, progress.age_s - self._late_s - self.starved_s)
        if progress.phase is not Phase.STEPPING or self._silent_s <= self.limit_s(progress.num_tokens):
            return None
        return self._silent_s

    def limit_s(self, num_tokens: int) -> float:
        """How long a rank in a step of so many tokens may be silent."""
        limit_s = max(HUNG_AFTER_AT_LEAST_S, TIMES_PREDICTED * self._predicted_s(_size(num_tokens)))
        return limit_s if self._stepped else max(limit_s, FIRST_STEP_S)

    def _remember(self, last: Progress, now: float) -> None:
        """The silence that followed the reading `last` is over."""
        if last.phase is not Phase.STEPPING:
            return
        if now - self._turned_at > REMEMBERED_S:
            self._longest_before, self._longest = self._longest, {}
            self._turned_at = now
        size = _size(last.num_tokens)
        self._longest[size] = max(self._longest.get(size, 0.0), self._silent_s)
        progress = self._last
        assert progress is not None
        self._stepped |= progress.phase is Phase.IDLE or progress.step != last.step

    def _predicted_s(self, size: int) -> float:
        seen = {
            known: max(self._longest.get(known, 0.0), self._longest_before.get(known, 0.0))
            for known in {*self._longest, *self._longest_before}
        }
        not_larger = [silence_s for known, silence_s in seen.items() if known <= size]
        if at_least := [known for known in seen if known >= size]:
            return max([*not_larger, seen[min(at_least)]])
        scaled = [silence_s * 2 ** (size - known) for known, silence_s in seen.items()]
        return max([*not_larger, min(max(scaled, default=0.0), SCALED_AT_MOST_S)], default=0.0)


def _size(num_tokens: int) -> int:
    return max(1, num_tokens).bit_length()
