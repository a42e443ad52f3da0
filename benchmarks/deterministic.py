"""What `--deterministic` costs: worlds with and without it, in turn, on the same cores.

`python -m benchmarks.deterministic [--rounds N] [--cores N] [--tp N ...]`. The ratio is the median of the rounds'
ratios, 1 means that it costs nothing.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack

from benchmarks.common import bare_world, machine, median, model_folder, pin, show, write
from benchmarks.offline import Generate, measure, phalanx_generate
from gateway.client import Client

WITH, WITHOUT = "deterministic", "default"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    cores = pin(arguments.cores)
    folder = model_folder()
    rows: list[list[object]] = []
    results: dict[str, dict[str, dict[str, list[float]]]] = {}
    for tp in arguments.tp:
        figures: dict[str, dict[str, list[float]]] = {WITH: {}, WITHOUT: {}}
        with ExitStack() as stack:
            contestants: dict[str, Generate] = {}
            for name, options in ((WITHOUT, []), (WITH, ["--deterministic"])):
                endpoint = stack.enter_context(bare_world(folder, tp, 1, *options))
                contestants[name] = phalanx_generate(stack.enter_context(Client(endpoint)))
                contestants[name](2, 64, 4)  # warm-up
            for number in range(arguments.rounds):
                # Whoever comes first in one round comes second in the next.
                for name in (WITH, WITHOUT) if number % 2 else (WITHOUT, WITH):
                    for work, speed in measure(contestants[name]).items():
                        figures[name].setdefault(work, []).append(speed)
                print(f"tp {tp}: round {number + 1} of {arguments.rounds} done", file=sys.stderr)
        results[f"tp {tp}"] = figures
        for work, speeds in figures[WITH].items():
            pairs = [one / other for one, other in zip(speeds, figures[WITHOUT][work], strict=True)]
            rows.append([f"tp {tp}, {work}", median(figures[WITHOUT][work]), median(speeds), median(pairs)])
    show("bfloat16, tokens/s, medians", ["", WITHOUT, WITH, "ratio"], rows)
    write("deterministic", {"machine": machine(cores), "tokens_per_second": results})


if __name__ == "__main__":
    main()
