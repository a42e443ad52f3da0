"""What a second core brings as a second rank: tp 2 on two cores beside tp 1 on one of them, in turn.

`python -m benchmarks.tensor_parallel [--rounds N] [--before FOLDER]`. The worlds stay loaded; in each round each does
each piece of work, and the ratio is the median of the rounds' ratios. They run the step loop without gateway: no
client takes part of a core. What memory gives to one core and to two is measured in each round: where a step waits
for its weights alone, it cannot gain more than that. `--before`: another checkout with its kernels built, whose tp 2
takes its turns, too. Results, without `--before`: benchmarks/results/tensor_parallel.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.common import ROOT, machine, median, model_folder, mpi_environment, mpirun, pin, show, write
from benchmarks.memory_reads import bytes_per_second

BATCHES = (1, 8, 32)
PROMPT_TOKENS, DECODED_TOKENS = 64, 64
PREFILL_SEQUENCES, PREFILL_TOKENS = 4, 1024


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


def measure(ranks: Ranks) -> dict[str, float]:
    """Tokens per second of each piece of work."""
    speeds = {}
    for batch in BATCHES:
        done = ranks.work(batch, PROMPT_TOKENS, 1 + DECODED_TOKENS)
        speeds[f"decode, {batch} sequence{'s' * (batch > 1)}"] = done["decoded"] / done["decode_s"]
    done = ranks.work(PREFILL_SEQUENCES, PREFILL_TOKENS, 1)
    speeds[f"prefill, {PREFILL_SEQUENCES} x {PREFILL_TOKENS}"] = (
        PREFILL_SEQUENCES * PREFILL_TOKENS / done["seconds"]
    )
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--before", type=Path)
    arguments = parser.parse_args()
    cores = pin(2)
    folder = str(model_folder())
    figures: dict[str, dict[str, list[float]]] = {}
    memory: dict[str, list[float]] = {"one core": [], "two cores": []}
    with ExitStack() as stack:
        shards = stack.enter_context(tempfile.TemporaryDirectory())
        worlds = {}
        shapes = {"tp 1, one core": (ROOT, 1), "tp 2, two cores": (ROOT, 2)}
        if arguments.before is not None:
            shapes["tp 2, before"] = (arguments.before, 2)
        for name, (root, tp) in shapes.items():
            figures[name] = {}
            segments = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="phalanx-bench-", dir="/dev/shm")
            )
            worlds[name] = Ranks(root, tp, cores[:tp], folder, shards, segments)
            stack.callback(worlds[name].close)
            measure(worlds[name])
        for number in range(arguments.rounds):
            for count, name in enumerate(memory, 1):
                memory[name].append(bytes_per_second(cores[:count]))
            for name, ranks in worlds.items():
                for work, value in measure(ranks).items():
                    figures[name].setdefault(work, []).append(value)
            print(f"round {number + 1} of {arguments.rounds} done", file=sys.stderr)
    report(figures, memory, cores)


def report(
    figures: dict[str, dict[str, list[float]]], memory: dict[str, list[float]], cores: list[int]
) -> None:
    one, *others = figures.values()
    ratios = {
        name: {
            work: median([of_two / of_one for of_one, of_two in zip(one[work], speeds[work], strict=True)])
            for work in one
        }
        for name, speeds in list(figures.items())[1:]
    }
    bound = median([both / alone for alone, both in zip(*memory.values(), strict=True)])
    rows: list[list[object]] = [
        [work, *(median(speeds[work]) for speeds in figures.values()), *(of[work] for of in ratios.values())]
        for work in one
    ]
    show("SmolLM2-135M in bfloat16, tokens/s, medians", ["", *figures, *("ratio" for _ in ratios)], rows)
    gigabytes = [median(values) / 1e9 for values in memory.values()]
    print(
        f"memory reads {gigabytes[0]:.1f} GB/s on one core, {gigabytes[1]:.1f} GB/s on two: {bound:.2f} times as much"
    )
    if len(others) > 1:
        return
    write(
        "tensor_parallel",
        {
            "machine": machine(cores),
            "tokens_per_second": figures,
            "bytes_per_second": memory,
            "ratios": next(iter(ratios.values())),
            "memory_ratio": bound,
        },
    )


if __name__ == "__main__":
    main()
