"""What a rank runs for the diagnostic model `echo`: a step loop without a model; its tokens are those of the prompt.

Called by `engine.rank` alone, in place of the engine. It uses the step loop's port, so that requests, cancels and
tokens go the way they always go; there is no plan, no MPI and no torch, and it starts in a moment.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping

from engine.plan import TokenLogprobs
from engine.scheduling.scheduler import FinishReason, NewToken
from engine.scheduling.sequence import Sequence
from engine.step_loop import IDLE_WAIT_S, Key, ProgressSign, RequestPort, Status

STEP_VARIABLE = "PHALANX_ECHO_STEP_S"
"""Environment variable: seconds from one token of a sequence to its next; the first comes at once."""
STEP_S = 0.01

_CERTAIN = 0.0
"""Log-probability of what is sure to come."""


def step_s(environment: Mapping[str, str] = os.environ) -> float:
    """Seconds between steps, 0 or more; what is no such number counts as not set."""
    try:
        chosen = float(environment.get(STEP_VARIABLE, ""))
    except ValueError:
        return STEP_S
    return chosen if 0 <= chosen < float("inf") else STEP_S


class EchoLoop:
    """Rank 0 of a world of one rank: each step brings one token of every sequence that runs."""

    def __init__(self, port: RequestPort, sign: ProgressSign, pause_s: float) -> None:
        self._port = port
        self._sign = sign
        self._pause_s = pause_s
        self._running: dict[Key, Sequence] = {}
        self._stopping = False
        self._step = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._next_step_at = 0.0

    def stop(self) -> None:
        """Ends the loop. May be called by a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Serves until `stop`."""
        while not self._stopping:
            new = self._take_requests()
            now = time.monotonic()
            if now >= self._next_step_at:
                self._next_step_at = now + self._pause_s
                self._advance(list(self._running.values()))
            elif new:  # what has just come does not wait for the others
                self._advance(new)

    def _take_requests(self) -> list[Sequence]:
        """Those that are new; waits for them while nothing is to be done."""
        if not self._running:
            self._sign.idle()
            self._port.report(self._status())
        wait_s = max(0.0, self._next_step_at - time.monotonic()) if self._running else IDLE_WAIT_S
        arrivals, cancelled = self._port.receive(wait_s)
        new = []
        for sequence in arrivals:
            if problem := _problem(sequence):
                self._port.refuse(sequence.key, problem)
                continue
            self._prompt_tokens += len(sequence.tokens)
            self._running[sequence.key] = sequence
            new.append(sequence)
        ended = [self._running.pop(key) for key in cancelled if key in self._running]
        if ended:
            tokens = [NewToken(s.key, s.num_output_tokens, None, "cancelled") for s in ended]
            self._port.send(self._step, tokens)
        return [sequence for sequence in new if sequence.key in self._running]

    def _advance(self, sequences: list[Sequence]) -> None:
        if not sequences:
            return
        self._step += 1
        self._sign.stepping(self._step, len(sequences))
        self._port.send(self._step, list(self._tokens(sequences)))
        self._generation_tokens += len(sequences)
        self._port.report(self._status())

    def _tokens(self, sequences: list[Sequence]) -> Iterator[NewToken]:
        for sequence in sequences:
            token = next_token(sequence)
            if token.finish_reason is not None:
                del self._running[sequence.key]
            yield token

    def _status(self) -> Status:
        return Status(
            step=self._step,
            num_running=len(self._running),
            num_waiting=0,
            kv_blocks_used=0,
            kv_blocks_total=1,
            num_preemptions=0,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_cache_queries=0,
            prefix_cache_hits=0,
        )


def next_token(sequence: Sequence) -> NewToken:
    """Output token i is prompt token (i + choice) modulo the prompt's length, whichever world makes it."""
    position = sequence.num_output_tokens
    token = sequence.tokens[(position + sequence.params.choice) % sequence.num_prompt_tokens]
    sequence.tokens.append(token)
    reason: FinishReason | None = None
    stop: int | None = None
    if token in sequence.end_token_ids:
        reason = "stop"
    elif token in sequence.stop_token_ids:
        reason, stop = "stop", token
    elif sequence.num_output_tokens >= sequence.max_tokens:
        reason = "length"
    logprobs = TokenLogprobs(token, _CERTAIN, 1, [], []) if sequence.params.num_logprobs >= 0 else None
    return NewToken(sequence.key, position, token, reason, stop, logprobs)


def _problem(sequence: Sequence) -> str | None:
    """Why this model cannot answer it; None if it can."""
    params = sequence.params
    asked = {
        "structured output": params.grammar is not None,
        "embeddings and scores": params.pooling is not None,
        "prompt log-probabilities": params.num_prompt_logprobs >= 0,
        "alternatives among log-probabilities": params.num_logprobs > 0,
    }
    missing = [what for what, is_asked in asked.items() if is_asked]
    return f"the echo model has no {missing[0]}; serve a real model for that" if missing else None
