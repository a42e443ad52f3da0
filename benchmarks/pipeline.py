"""How much of two pipeline stages is at work: decode and prefill with pp 2 against one rank, one thread each.

`python -m benchmarks.pipeline [--rounds N]`. Two stages with a batch each in flight could at best do twice the work
of one rank on one core; what is missing to that is bubble, transfer and the uneven cut.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack

from benchmarks.common import bare_world, machine, median, model_folder, pin, show, write
from benchmarks.offline import measure, phalanx_generate
from gateway.client import Client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    cores = pin(2)
    folder = model_folder()
    figures: dict[str, dict[str, list[float]]] = {"one rank": {}, "pp 2": {}}
    with ExitStack() as stack:
        contestants = {}
        for name, pp in (("one rank", 1), ("pp 2", 2)):
            endpoint = stack.enter_context(bare_world(folder, 1, pp, "--threads", "1"))
            contestants[name] = phalanx_generate(stack.enter_context(Client(endpoint)))
            contestants[name](2, 64, 4)  # warm-up
        for round_number in range(arguments.rounds):
            for name, generate in contestants.items():
                for work, value in measure(generate).items():
                    figures[name].setdefault(work, []).append(value)
            print(f"round {round_number + 1} of {arguments.rounds} done", file=sys.stderr)
    rows: list[list[object]] = []
    shares: dict[str, float] = {}
    for work, alone in figures["one rank"].items():
        staged = figures["pp 2"][work]
        shares[work] = median([two / (2 * one) for one, two in zip(alone, staged, strict=True)])
        rows.append([work, median(alone), median(staged), f"{shares[work]:.0%}"])
    show("bfloat16, tokens/s, one thread a rank", ["", "one rank", "pp 2", "of twice one rank"], rows)
    write("pipeline", {"machine": machine(cores), "tokens_per_second": figures, "share_of_ideal": shares})


if __name__ == "__main__":
    main()
