"""Where a decode step's time goes on one rank, and what memory would allow: prints benchmarks/profile.md.

`python -m benchmarks.profile [--cores N] [--kernels NAME]`. The engine runs in this process, without gateway: what
the step loop does for requests and clients is in benchmarks/serve.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

from benchmarks.common import machine, model_folder, pin
from benchmarks.peers.work import prompt
from engine.collectives.mpi import join_world
from engine.engine import Engine, EngineSettings, build_engine
from engine.plan import PlanCodec, SequenceParams
from engine.scheduling.sequence import Sequence

PROMPT_TOKENS, WARM_UP_STEPS, STEPS = 64, 8, 96


class Clock:
    """Seconds that named parts of a step took, one list of steps each."""

    def __init__(self) -> None:
        self.steps: dict[str, list[float]] = defaultdict(list)

    def watch(self, owner: Any, method: str, part: str) -> None:
        """Times every call of a method from now on."""
        inner = getattr(owner, method)

        def timed(*arguments: Any) -> Any:
            begin = time.perf_counter()
            result = inner(*arguments)
            self.steps[part].append(time.perf_counter() - begin)
            return result

        setattr(owner, method, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--kernels", default="auto", help="as --kernels of a rank; off: torch")
    arguments = parser.parse_args()
    cores = pin(arguments.cores)
    torch.set_num_threads(len(cores))
    with tempfile.TemporaryDirectory() as shards:
        settings = EngineSettings(
            model_dir=model_folder(), shard_cache=Path(shards), dtype="bfloat16", kernels=arguments.kernels
        )
        engine = build_engine(join_world(1, 1), settings, torch.device("cpu"), lambda _done, _total: None)
        weight_bytes = sum(file.stat().st_size for file in Path(shards).rglob("*.safetensors"))
        print(
            f"{machine(cores)['cpu']}, {len(cores)} cores, SmolLM2-135M in bfloat16, {engine.computed_by}.\n"
        )
        bandwidth = memory_bandwidth()
        limit_ms = weight_bytes / bandwidth * 1e3
        print(
            f"Memory reads {bandwidth / 1e9:.1f} GB/s; a step reads {weight_bytes / 2**20:.0f} MiB of weights, "
            f"which takes {limit_ms:.2f} ms.\n"
        )
        for num_sequences in (1, 32):
            report(num_sequences, profile(engine, num_sequences), limit_ms)


def memory_bandwidth() -> float:
    """Bytes per second that all threads read together: the best of ten passes over 512 MiB."""
    array = torch.ones(128 * 2**20)
    best = float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        array.sum()
        best = min(best, time.perf_counter() - begin)
    return array.numel() * array.element_size() / best


def profile(engine: Engine, num_sequences: int) -> dict[str, float]:
    """Milliseconds of the parts of a steady decode step of so many sequences."""
    scheduler, runner, codec, clock = engine.new_scheduler(1), engine.runner, PlanCodec(1), Clock()
    for index in range(num_sequences):
        scheduler.add(
            Sequence(
                key=(b"profile", str(index)),
                tokens=prompt(index, PROMPT_TOKENS, num_sequences),
                num_prompt_tokens=PROMPT_TOKENS,
                max_tokens=WARM_UP_STEPS + STEPS + 8,
                end_token_ids=frozenset(),
                stop_token_ids=frozenset(),
                params=SequenceParams(0.0, 1.0, 0, index, 0, num_prompt_tokens=PROMPT_TOKENS),
            )
        )
    table, stage, sampler = runner._table, runner._stage, runner.sampler
    originals = [(owner, dict(owner.__dict__)) for owner in (table, stage, sampler, runner)]
    clock.watch(table, "apply", "batch from the plan")
    clock.watch(stage, "embed", "embedding")
    clock.watch(stage, "layers", "layers")
    # Greedy rows: the head keeps the greatest logits itself, where it can.
    if runner.greatest is not None:
        clock.watch(runner, "greatest", "last norm and head")
        clock.watch(runner, "_draw_greedily", "sampling")
    else:
        clock.watch(stage, "logits", "last norm and head")
        clock.watch(sampler, "draw", "sampling")
    steady = 0
    while scheduler.has_work:
        begin = time.perf_counter()
        plan = scheduler.schedule(0)
        assert plan is not None
        codec.encode(plan)
        scheduled = time.perf_counter()
        result = runner.run(plan)
        computed = time.perf_counter()
        assert result is not None
        list(scheduler.complete(0, result))
        end = time.perf_counter()
        if plan.chunks or len(plan.decode_handles) < num_sequences or steady < WARM_UP_STEPS:
            steady += not plan.chunks
            for times in clock.steps.values():
                times.clear()
            continue
        clock.steps["schedule, encode the plan, complete"].append(scheduled - begin + end - computed)
        clock.steps["step"].append(end - begin)
        if len(clock.steps["step"]) == STEPS:
            break
    for owner, before in originals:
        owner.__dict__.clear()
        owner.__dict__.update(before)
    # Of the steps in the middle, so that the parts add up and a disturbed step does not count.
    totals = clock.steps["step"]
    order = sorted(range(len(totals)), key=totals.__getitem__)
    middle = order[len(order) // 3 : -(len(order) // 3)]
    return {
        part: sum(times[step] for step in middle) / len(middle) * 1e3 for part, times in clock.steps.items()
    }


def report(num_sequences: int, parts: dict[str, float], limit_ms: float) -> None:
    """A table in Markdown."""
    step = parts.pop("step")
    native = parts["layers"] + parts["last norm and head"] + parts["embedding"]
    print(f"## {num_sequences} sequence{'s' * (num_sequences > 1)}\n")
    print(f"{step:.2f} ms a step, {num_sequences / step * 1e3:.0f} tokens/s\n")
    print("| part | ms | share |\n|---|---|---|")
    for part, milliseconds in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"| {part} | {milliseconds:.3f} | {milliseconds / step:.1%} |")
    rest = step - sum(parts.values())
    print(f"| rest | {rest:.3f} | {rest / step:.1%} |\n")
    print(f"Outside of embedding, layers and head: {1 - native / step:.1%}. ", end="")
    print(f"Reading the weights alone would take {limit_ms / step:.0%} of the step.\n")


if __name__ == "__main__":
    main()
