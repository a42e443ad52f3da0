"""Drives a real world without processes around it: requests go in at rank 0, every rank runs its own loop."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from pathlib import Path

import numpy as np
import torch

from engine.engine import Engine, EngineSettings, build_engine
from engine.execution.batch import Batch
from engine.execution.sampler import Sampler
from engine.plan import SequenceParams, StepPlan, TokenLogprobs
from engine.scheduling.scheduler import NewToken, Scheduler
from engine.scheduling.sequence import Sequence
from engine.step_loop import Key, Leader, Status, follow
from engine.world import World
from tests import references


def build(world: World, folder: Path | None = None, **settings: object) -> Engine:
    """The model of `folder`, or else the real one, cut over this world."""
    if folder is None:
        folder = references.model_folder()
    cache = references.ROOT / "build" / "test-shards"
    every = EngineSettings(model_dir=folder, shard_cache=Path(cache), **settings)  # type: ignore[arg-type]
    return build_engine(world, every, torch.device("cpu"), lambda _done, _total: None)


def request(
    name: int,
    prompt: list[int],
    max_tokens: int,
    temperature: float = 0.0,
    output: list[int] | None = None,
    priority: int = 0,
    **params: object,
) -> Sequence:
    """A request whose seed is its name, so that the sampler, too, can tell whose row it sees."""
    every = {"top_p": 1.0, "top_k": 0, "choice": 0, "num_prompt_tokens": len(prompt), **params}
    return Sequence(
        key=(b"test", str(name)),
        tokens=prompt + (output or []),
        num_prompt_tokens=len(prompt),
        max_tokens=max_tokens,
        end_token_ids=frozenset(),
        stop_token_ids=frozenset(),
        params=SequenceParams(temperature=temperature, seed=name, **every),  # type: ignore[arg-type]
        priority=priority,
        prompt_logprobs=[] if "num_prompt_logprobs" in params else None,
    )


class _Sign:
    def idle(self) -> None: ...

    def stepping(self, step: int, num_tokens: int) -> None: ...


class _Port:
    def __init__(self, requests: list[Sequence], cancel_after: dict[Key, int]) -> None:
        self._requests = requests
        self._unfinished = {sequence.key for sequence in requests}
        self._cancel_after = cancel_after
        self.tokens: dict[Key, list[int]] = {sequence.key: [] for sequence in requests}
        self.ends: dict[Key, str] = {}
        self.news: list[NewToken] = []
        self.stop: Callable[[], None]

    def receive(self, timeout_s: float) -> tuple[list[Sequence], list[Key]]:
        new, self._requests = self._requests, []
        cancelled = [
            key for key, count in self._cancel_after.items()
            if key in self._unfinished and len(self.tokens[key]) >= count
        ]  # fmt: skip
        return new, cancelled

    def send(self, step: int, tokens: list[NewToken]) -> None:
        for token in tokens:
            received = self.tokens[token.key]
            self.news.append(token)
            if token.token_id is not None:
                assert token.position == len(received) + self.offset(token.key), (
                    "a position is missing or repeated"
                )
                received.append(token.token_id)
            if token.finish_reason is not None:
                self.ends[token.key] = token.finish_reason
                self._unfinished.remove(token.key)
        if not self._unfinished:
            self.stop()

    offsets: dict[Key, int]

    def offset(self, key: Key) -> int:
        return self.offsets[key]

    def refuse(self, key: Key, message: str) -> None:
        raise AssertionError(f"{key} was refused: {message}")

    def report(self, status: Status) -> None: ...


class Run:
    """What `serve` brought. At ranks other than 0 everything but `logits` is empty."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, str] = {}
        self.num_preemptions = 0
        self.num_hit_tokens = 0
        self.most_outstanding_plans = 0
        self.news: list[NewToken] = []
        """Everything that rank 0 sent, in order."""
        self.logits: dict[tuple[int, int], np.ndarray] = {}
        """By (name of the request, absolute position): filled at the sampler."""


def serve(
    world: World,
    engine: Engine,
    requests: list[Sequence],
    cancel_after: dict[int, int] | None = None,
    record_logits: bool = False,
    kv_blocks: int | None = None,
) -> Run:
    """Runs all requests to their ends on every rank, and checks that nothing is left behind."""
    run = Run()
    runner = engine.runner
    if record_logits:
        runner = copy(runner)
        runner.greatest = None
        if engine.runner.sampler is not None:
            runner.sampler = _Recorder(engine.runner.sampler, run)
    if world.at.rank != 0:
        follow(world, runner, _Sign())
        return run
    scheduler: Scheduler = engine.new_scheduler(world.at.pp)
    if kv_blocks is not None:
        from engine.scheduling.kv_blocks import BlockPool

        scheduler.pool = BlockPool(kv_blocks, scheduler.pool.block_size)
    cancels = {(b"test", str(name)): count for name, count in (cancel_after or {}).items()}
    port = _Port(requests, cancels)
    port.offsets = {sequence.key: sequence.num_output_tokens for sequence in requests}
    leader = _CountingLeader(world, scheduler, runner, port, _Sign())
    port.stop = leader.stop
    leader.run()
    scheduler.check_idle()
    assert scheduler.pool.num_used == 0
    run.tokens = {int(key[1]): tokens for key, tokens in port.tokens.items()}
    run.ends = {int(key[1]): end for key, end in port.ends.items()}
    run.num_preemptions = scheduler.num_preemptions
    run.num_hit_tokens = scheduler.pool.num_hit_tokens
    run.news = port.news
    run.most_outstanding_plans = leader.most_outstanding_plans
    return run


class _CountingLeader(Leader):
    most_outstanding_plans = 0

    def _start(self, plan: StepPlan) -> None:
        super()._start(plan)
        self.most_outstanding_plans = max(self.most_outstanding_plans, len(self._outstanding))


class _Recorder(Sampler):
    """The same sampler, keeping the logits that tokens are drawn from."""

    def __init__(self, sampler: Sampler, run: Run) -> None:
        self.__dict__.update(sampler.__dict__)
        self._run = run

    def draw(
        self, logits: torch.Tensor, batch: Batch, plan: StepPlan
    ) -> tuple[list[int], list[TokenLogprobs | None]]:
        for row, (params, position) in enumerate(
            zip(batch.sampling_params, batch.sampling_positions, strict=True)
        ):
            self._run.logits[params.seed, position] = logits[row].numpy().copy()
        return super().draw(logits, batch, plan)
