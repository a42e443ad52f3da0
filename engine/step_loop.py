"""The loop of a world: rank 0 receives, schedules, broadcasts, computes and answers; the others follow.

Called by `engine.rank`. It knows neither ZeroMQ nor processes: requests come through a port that it is given.
It never tries to survive: an exception in a step ends the rank, and with it the world.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Protocol

import msgspec

from engine.plan import PlanCodec, StepPlan, StepResult
from engine.scheduling.scheduler import NewToken, Refused, Scheduler
from engine.scheduling.sequence import Sequence
from engine.world import World

if TYPE_CHECKING:
    # With it comes torch, which a world without a model does not need.
    from engine.execution.stage import StageRunner

IDLE_WAIT_S = 0.25
"""How long rank 0 sleeps on its port when there is nothing to do, before it looks for a stop signal."""

Key = tuple[bytes, str]


@dataclass(frozen=True)
class Status:
    """What clients are told of the engine's state."""

    step: int
    num_running: int
    num_waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    num_preemptions: int
    prompt_tokens: int
    """Tokens of prompts (and of replayed or preempted sequences) computed so far."""
    generation_tokens: int
    prefix_cache_queries: int
    """Prompt tokens looked up in the prefix cache, and those found there."""
    prefix_cache_hits: int


class RequestPort(Protocol):
    """Where rank 0's requests come from and their tokens go."""

    def receive(self, timeout_s: float) -> tuple[list[Sequence], list[Key]]:
        """New sequences, and keys of those to cancel; waits up to `timeout_s` while there are none."""
        ...

    def send(self, step: int, tokens: list[NewToken]) -> None: ...

    def refuse(self, key: Key, message: str) -> None: ...

    def report(self, status: Status) -> None: ...


class ProgressSign(Protocol):
    """Where a rank shows what it is doing."""

    def idle(self) -> None: ...

    def stepping(self, step: int, num_tokens: int) -> None: ...


class Leader:
    """Rank 0: one turn for each pipeline slot, with a plan outstanding in every slot that has work."""

    def __init__(
        self, world: World, scheduler: Scheduler, runner: StageRunner, port: RequestPort, sign: ProgressSign
    ) -> None:
        self._world = world
        self._scheduler = scheduler
        self._runner = runner
        self._port = port
        self._sign = sign
        self._codec = PlanCodec(world.at.pp)
        self._decoder = msgspec.msgpack.Decoder(StepResult)
        self._outstanding: dict[int, StepPlan] = {}
        self._stopping = False
        self._step = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0

    def stop(self) -> None:
        """Ends the loop after the steps that are under way. May be called by a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Serves until `stop`; then the other ranks leave their loops too."""
        for slot in cycle(range(self._world.at.pp)):
            self._take_requests()
            if slot in self._outstanding:
                plan = self._outstanding.pop(slot)
                self._deliver(plan, self._decoder.decode(self._world.control.receive_result(slot)))
            if self._stopping and not self._outstanding:
                break
            next_plan = None if self._stopping else self._scheduler.schedule(slot)
            if next_plan is not None:
                self._start(next_plan)
        self._world.control.broadcast_plan(self._codec.encode(StepPlan(self._step + 1, 0, stop=True)))

    def _take_requests(self) -> None:
        busy = bool(self._outstanding) or self._scheduler.has_work or self._stopping
        if not busy:
            self._scheduler.check_idle()
            self._sign.idle()
            self._port.report(self._status())
        arrivals, cancelled = self._port.receive(0.0 if busy else IDLE_WAIT_S)
        for sequence in arrivals:
            try:
                self._scheduler.add(sequence)
            except Refused as refusal:
                self._port.refuse(sequence.key, str(refusal))
        ended = [token for key in cancelled if (token := self._scheduler.cancel(key)) is not None]
        if ended:
            self._port.send(self._step, ended)

    def _start(self, plan: StepPlan) -> None:
        self._step = plan.step
        self._sign.stepping(plan.step, plan.num_tokens)
        self._world.control.broadcast_plan(self._codec.encode(plan))
        began = time.perf_counter()
        result = self._runner.run(plan)
        num_chunk_tokens = plan.num_tokens - len(plan.decode_tokens)
        if self._scheduler.pace is not None:
            # Of this rank's stage: what a token costs beside a decode step is much the same in the others.
            duration_s = time.perf_counter() - began
            self._scheduler.pace.note(len(plan.decode_tokens), num_chunk_tokens, duration_s)
        self._prompt_tokens += num_chunk_tokens
        if result is not None:
            self._deliver(plan, result)
        else:
            self._outstanding[plan.slot] = plan

    def _deliver(self, plan: StepPlan, result: StepResult) -> None:
        self._generation_tokens += len(result.token_ids)
        self._port.send(plan.step, list(self._scheduler.complete(plan.slot, result)))
        self._port.report(self._status())

    def _status(self) -> Status:
        scheduler = self._scheduler
        return Status(
            step=self._step,
            num_running=scheduler.num_running,
            num_waiting=len(scheduler.waiting),
            kv_blocks_used=scheduler.pool.num_used,
            kv_blocks_total=scheduler.pool.num_blocks,
            num_preemptions=scheduler.num_preemptions,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_cache_queries=scheduler.pool.num_queried_tokens,
            prefix_cache_hits=scheduler.pool.num_hit_tokens,
        )


def follow(world: World, runner: StageRunner, sign: ProgressSign) -> None:
    """Every rank but 0: plans come, steps are computed, until the plan that says stop."""
    codec = PlanCodec(world.at.pp)
    encoder = msgspec.msgpack.Encoder()
    while True:
        sign.idle()
        plan = codec.decode(world.control.receive_plan())
        if plan.stop:
            return
        sign.stepping(plan.step, plan.num_tokens)
        result = runner.run(plan)
        if result is not None:
            world.control.send_result(plan.slot, encoder.encode(result))
