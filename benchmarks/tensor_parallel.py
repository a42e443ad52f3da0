"""What a second core brings as a second rank: tp 2 on two cores beside tp 1 on one of them, in turn.

`python -m benchmarks.tensor_parallel [--rounds N] [--resume] [--before FOLDER]`. All worlds stay loaded; in each
round each does each piece of work, and ratios are medians of the rounds' ratios. They run the step loop without
gateway: no client takes part of a core. What the machine itself gives to two cores is measured in each round, too,
since no tp 2 can gain more: what two worlds of tp 1, each with weights of its own, do at once, and what memory gives
to one core and to two. `--before`: another checkout with its kernels built, whose tp 2 takes its turns, too. Results
after each round, but not with `--before`: benchmarks/results/tensor_parallel.json; `--resume` adds rounds to those.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from benchmarks.common import (
    RESULTS,
    ROOT,
    machine,
    median,
    model_folder,
    mpi_environment,
    mpirun,
    pin,
    show,
    write,
)
from benchmarks.memory_reads import bytes_per_second

WORKS = {
    "decode, 1 sequence": (1, 16, 65),
    "decode, 8 sequences": (8, 16, 65),
    "decode, 32 sequences": (32, 16, 49),
    "prefill, 2 x 1024": (2, 1024, 1),
}
"""Sequences, tokens of each one's prompt, new tokens."""
ONE, TWO, BOTH, BEFORE = "tp 1, one core", "tp 2, two cores", "two of tp 1, one core each", "tp 2, before"

Figures = dict[str, dict[str, list[float]]]


class Ranks:
    """A world of `benchmarks.tensor_parallel_rank`."""

    def __init__(
        self, root: Path, tp: int, cores: list[int], folder: str, shards: str, segments: str
    ) -> None:
        command = [
            "taskset", "-c", ",".join(map(str, cores)), *mpirun(tp, segments), sys.executable, "-m",
            "benchmarks.tensor_parallel_rank", folder, shards, str(tp),
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command, cwd=root, env={**mpi_environment(), "PYTHONPATH": str(root)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        if self._stdout.readline().strip() != "ready":
            raise RuntimeError(f"tp {tp} did not start, exit code {self._process.wait()}")

    def work(self, sequences: int, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
        """Seconds: see LinePort."""
        self._stdin.write(f"{sequences} {prompt_tokens} {new_tokens}\n")
        self._stdin.flush()
        answer: dict[str, float] = json.loads(self._stdout.readline())
        return answer

    def close(self) -> None:
        self._stdin.write("\n")  # mpirun keeps the end of its own input to itself
        self._stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stdout.close()

    def speed(self, name: str) -> float:
        """Tokens per second of a piece of work."""
        sequences, prompt_tokens, new_tokens = WORKS[name]
        done = self.work(sequences, prompt_tokens, new_tokens)
        if new_tokens == 1:
            return sequences * prompt_tokens / done["seconds"]
        return done["decoded"] / done["decode_s"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--before", type=Path)
    arguments = parser.parse_args()
    cores = pin(2)
    folder = str(model_folder())
    figures: Figures = {name: {} for name in (ONE, TWO, BOTH)}
    memory: dict[str, list[float]] = {"one core": [], "two cores": []}
    if arguments.resume and (file := RESULTS / "tensor_parallel.json").exists():
        known = json.loads(file.read_text())
        figures, memory = known["tokens_per_second"], known["bytes_per_second"]
    with ExitStack() as stack:

        def world(root: Path, tp: int, on_cores: list[int]) -> Ranks:
            shards, segments = (
                stack.enter_context(tempfile.TemporaryDirectory(prefix="phalanx-bench-", dir=where))
                for where in (None, "/dev/shm")
            )
            ranks = Ranks(root, tp, on_cores, folder, shards, segments)
            stack.callback(ranks.close)
            for name in WORKS:
                ranks.speed(name)
            return ranks

        single, other, double = world(ROOT, 1, cores[:1]), world(ROOT, 1, cores[1:]), world(ROOT, 2, cores)
        before = None if arguments.before is None else world(arguments.before, 2, cores)
        pool = stack.enter_context(ThreadPoolExecutor(2))
        for number in range(arguments.rounds):
            for count, name in enumerate(memory, 1):
                memory[name].append(bytes_per_second(cores[:count]))
            for name in WORKS:
                speeds = {ONE: single.speed(name), TWO: double.speed(name)}
                speeds[BOTH] = sum(pool.map(lambda ranks, work=name: ranks.speed(work), (single, other)))
                if before is not None:
                    speeds[BEFORE] = before.speed(name)
                for who, speed in speeds.items():
                    figures.setdefault(who, {}).setdefault(name, []).append(speed)
            print(f"round {number + 1} of {arguments.rounds} done", file=sys.stderr)
            if before is None:
                save(figures, memory, cores)
    report(figures, memory)


def ratios(figures: Figures) -> dict[str, dict[str, float]]:
    """Of each world's speeds to those of tp 1 on one core: medians over the rounds."""
    return {
        who: {
            name: median([speed / one for speed, one in zip(speeds[name], figures[ONE][name], strict=True)])
            for name in WORKS
        }
        for who, speeds in figures.items()
        if who != ONE
    }


def memory_ratio(memory: dict[str, list[float]]) -> float:
    return median([two / one for one, two in zip(*memory.values(), strict=True)])


def save(figures: Figures, memory: dict[str, list[float]], cores: list[int]) -> None:
    write(
        "tensor_parallel",
        {
            "machine": machine(cores),
            "load": Path("/proc/loadavg").read_text().split()[:3],
            "tokens_per_second": figures,
            "bytes_per_second": memory,
            "ratios": ratios(figures),
            "memory_ratio": memory_ratio(memory),
        },
    )


def report(figures: Figures, memory: dict[str, list[float]]) -> None:
    found = ratios(figures)
    rows: list[list[object]] = [
        [
            name,
            median(figures[ONE][name]),
            *(value for who in found for value in (median(figures[who][name]), found[who][name])),
        ]
        for name in WORKS
    ]
    columns = ["", ONE]
    for who in found:
        columns += [who, "ratio"]
    show("SmolLM2-135M in bfloat16, tokens/s, medians", columns, rows)
    one, two = (median(values) / 1e9 for values in memory.values())
    print(f"memory: {one:.1f} GB/s on one core, {two:.1f} on two, {memory_ratio(memory):.2f} times as much")


if __name__ == "__main__":
    main()
