"""How many tokens of prompts a step may compute while streams wait for it.

The scheduler asks before each plan, the step loop tells how long steps took. Arithmetic alone: no clock, no request.
"""

from __future__ import annotations

STEP_FACTOR = 4.0
"""A step with a chunk takes about so many times as long as one without, where one prompt comes beside streams."""
LEAST_TOKENS = 128
"""A chunk costs something whatever its length, the more the longer the context before it: shorter ones would make the
prompt wait much longer, and streams hardly less. And a prompt always goes on."""
FIRST_TOKENS = 256
"""As long as nothing was measured."""
_WEIGHT = 0.5
"""Of the newest step in the averages."""


class Pace:
    """Learns what a decode step and a token of a prompt cost. The more tokens lie behind a chunk the more its tokens
    cost, so that what was learned last counts most."""

    def __init__(self, step_factor: float = STEP_FACTOR) -> None:
        self._step_factor = step_factor
        self._decode_s: float | None = None
        self._token_s: float | None = None

    def note(self, num_decoding: int, num_chunk_tokens: int, duration_s: float) -> None:
        """A step of so many decoding rows and chunk tokens took so long."""
        if not num_chunk_tokens:
            self._decode_s = _average(self._decode_s, duration_s)
        elif self._decode_s is not None or not num_decoding:
            of_rows_s = min(self._decode_s or 0.0, 0.9 * duration_s) if num_decoding else 0.0
            self._token_s = _average(self._token_s, (duration_s - of_rows_s) / num_chunk_tokens)

    def chunk_tokens(self, num_decoding: int, num_waiting: int) -> int:
        """Tokens of chunks beside `num_decoding` streams while `num_waiting` sequences wait for their first token.
        Who would wait longer for the next token counts as much as who waits for the first."""
        if self._decode_s is None or not self._token_s:
            return FIRST_TOKENS
        factor = self._step_factor * (1.0 + (num_waiting - 1) / num_decoding)
        return max(LEAST_TOKENS, int((factor - 1.0) * self._decode_s / self._token_s))


def _average(before: float | None, new: float) -> float:
    return new if before is None else before + _WEIGHT * (new - before)
