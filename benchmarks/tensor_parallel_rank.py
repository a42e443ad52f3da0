"""A rank of the worlds of `benchmarks.tensor_parallel`: the real step loop, with requests from standard input where a
world has its gateway. Rank 0 answers each line `sequences prompt_tokens new_tokens` with one line of JSON, and ends
with an empty one. Started by mpirun; with `parts` as last argument it says where the time of its steps went."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

from benchmarks.peers.work import prompts
from engine.collectives.mpi import join_world
from engine.engine import Engine, EngineSettings, build_engine
from engine.plan import SequenceParams
from engine.scheduling.scheduler import NewToken
from engine.scheduling.sequence import Sequence
from engine.step_loop import Key, Leader, Status, follow


class LinePort:
    """Requests from the lines of standard input, one line at a time; see step_loop.RequestPort."""

    def __init__(self) -> None:
        self._salt = 0
        self._begin = self._full_at = 0.0
        self._waiting_for: set[str] = set()
        self._tokens = self._tokens_when_full = self._steps = 0
        self.leader: Leader | None = None

    def receive(self, timeout_s: float) -> tuple[list[Sequence], list[Key]]:
        if not timeout_s:
            return [], []
        if self._salt:
            now = time.perf_counter()
            decode_s = now - self._full_at
            answer: dict[str, Any] = {"seconds": now - self._begin, "decode_s": decode_s}
            answer["decoded"] = self._tokens - self._tokens_when_full
            answer["steps"] = self._steps
            print(json.dumps(answer), flush=True)
        else:
            print("ready", flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            assert self.leader is not None
            self.leader.stop()
            return [], []
        sequences, prompt_tokens, new_tokens = map(int, line.split())
        self._salt += 1
        self._tokens = self._tokens_when_full = self._steps = 0
        self._waiting_for = {str(index) for index in range(sequences)}
        ids = prompts(sequences, prompt_tokens, self._salt)
        self._begin = time.perf_counter()
        return [_sequence(str(index), tokens, new_tokens) for index, tokens in enumerate(ids)], []

    def send(self, step: int, tokens: list[NewToken]) -> None:
        self._tokens += len(tokens)
        self._steps += 1
        if self._waiting_for:
            self._waiting_for -= {token.key[1] for token in tokens}
            if not self._waiting_for:
                self._full_at, self._tokens_when_full = time.perf_counter(), self._tokens
                self._steps = 0

    def refuse(self, key: Key, message: str) -> None:
        raise RuntimeError(message)

    def report(self, status: Status) -> None:
        return None


class Parts:
    """Seconds that parts of the steps took on this rank, since the last `clear`."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def watch(self, owner: Any, method: str, part: str) -> None:
        inner = getattr(owner, method)

        def timed(*arguments: Any) -> Any:
            begin = time.perf_counter()
            result = inner(*arguments)
            self.seconds[part].append(time.perf_counter() - begin)
            return result

        setattr(owner, method, timed)

    def watch_engine(self, world: Any, engine: Engine) -> None:
        runner: Any = engine.runner
        self._group = world.tensor_group
        self.watch(world.control, "receive_plan" if world.at.rank else "broadcast_plan", "plan")
        self.watch(runner, "run", "run")
        self.watch(runner._table, "apply", "of it: batch")
        self.watch(runner._stage, "embed", "of it: embedding")
        self.watch(runner._stage, "layers", "of it: layers")
        self.watch(runner, "greatest", "of it: last norm and head")
        self.watch(runner, "_draw_greedily", "of it: tokens")

    def show(self, rank: int) -> None:
        """Milliseconds of a step, medians; of all steps on the average what was waited for other ranks' halves."""
        steps = len(self.seconds["run"])
        waited_s = self._group.shared_sums(0).waited_s if self._group.size > 1 else 0.0
        print(f"rank {rank}, {steps} steps, ms", file=sys.stderr)
        for part, times in self.seconds.items():
            middle = sorted(times)[len(times) // 2] * 1e3
            print(f"  {part}: {middle:.3f}, all {sum(times) / steps * 1e3:.3f}", file=sys.stderr)
        print(f"  waited for other ranks: {waited_s / steps * 1e3:.3f}", file=sys.stderr, flush=True)


def _sequence(name: str, tokens: list[int], new_tokens: int) -> Sequence:
    return Sequence(
        key=(b"benchmark", name),
        tokens=tokens,
        num_prompt_tokens=len(tokens),
        max_tokens=new_tokens,
        end_token_ids=frozenset(),
        stop_token_ids=frozenset(),
        params=SequenceParams(0.0, 1.0, 0, 0, 0, num_prompt_tokens=len(tokens)),
    )


def main() -> None:
    folder, shards, tp = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    world = join_world(tp, 1)
    settings = EngineSettings(
        model_dir=folder, shard_cache=shards, dtype="bfloat16", kv_cache_bytes=512 * 2**20
    )
    engine = build_engine(world, settings, torch.device("cpu"), lambda _done, _total: None)
    world.control.barrier()
    parts = Parts() if "parts" in sys.argv[4:] else None
    if parts is not None:
        parts.watch_engine(world, engine)

    class Sign:
        def idle(self) -> None:
            return None

        def stepping(self, step: int, num_tokens: int) -> None:
            return None

    if world.at.rank:
        follow(world, engine.runner, Sign())
    else:
        port = LinePort()
        port.leader = Leader(world, engine.new_scheduler(1), engine.runner, port, Sign())
        port.leader.run()
    if parts is not None:
        for rank in range(tp):
            if rank == world.at.rank:
                parts.show(rank)
            world.control.barrier()
    world.control.close()


if __name__ == "__main__":
    main()
