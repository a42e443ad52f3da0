"""Decode and prefill throughput beside transformers: same weights, same cores, same run, in turn.

`python -m benchmarks.offline [--rounds N] [--cores N]`. Every contestant stays loaded; in each round each one does
each piece of work, so that a slow minute of a shared machine hits all of them. The ratio is the median of the
rounds' ratios. Phalanx is measured at a ZeroMQ client of rank 0, so its scheduler and gateway are in the figures.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from benchmarks.common import ROOT, bare_world, machine, median, model_folder, pin, show, write
from benchmarks.peers.driving import driven
from benchmarks.peers.work import Generate, prompt
from gateway.client import Client
from gateway.protocol import SamplingParams

BATCHES = (1, 8, 32)
PROMPT_TOKENS = 64
DECODED_TOKENS = 48
PREFILL_SEQUENCES, PREFILL_TOKENS = 8, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2)
    arguments = parser.parse_args()
    cores = pin(arguments.cores)
    folder = model_folder()
    figures: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        contestants: dict[str, Generate] = {}
        for tp in (1, 2):
            endpoint = stack.enter_context(bare_world(folder, tp))
            client = stack.enter_context(Client(endpoint))
            contestants[f"phalanx tp {tp}"] = phalanx_generate(client)
        command = [sys.executable, "-m", "benchmarks.peers.with_transformers", str(folder), str(len(cores))]
        peer = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        contestants["transformers"], _ = stack.enter_context(driven("transformers", peer))
        for name, generate in contestants.items():
            generate(2, PROMPT_TOKENS, 4)  # warm-up
            figures[name] = {}
        for round_number in range(arguments.rounds):
            for name, generate in contestants.items():
                for work, value in measure(generate).items():
                    figures[name].setdefault(work, []).append(value)
            print(f"round {round_number + 1} of {arguments.rounds} done", file=sys.stderr)
    _report(figures, cores)


def measure(generate: Generate) -> dict[str, float]:
    """Tokens per second of each piece of work."""
    speeds = {}
    for batch in BATCHES:
        first = generate(batch, PROMPT_TOKENS, 1)
        whole = generate(batch, PROMPT_TOKENS, 1 + DECODED_TOKENS)
        speeds[f"decode, {batch} sequence{'s' * (batch > 1)}"] = batch * DECODED_TOKENS / (whole - first)
    seconds = generate(PREFILL_SEQUENCES, PREFILL_TOKENS, 1)
    speeds[f"prefill, {PREFILL_SEQUENCES} x {PREFILL_TOKENS}"] = PREFILL_SEQUENCES * PREFILL_TOKENS / seconds
    return speeds


_SALTS = itertools.count()
"""Never the same prompt twice: nothing is to be found in the prefix cache."""


def phalanx_generate(client: Client) -> Generate:
    def generate(sequences: int, prompt_tokens: int, new_tokens: int) -> float:
        salt = next(_SALTS)
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        begin = time.perf_counter()
        streams = [client.submit(prompt(i, prompt_tokens, salt), params) for i in range(sequences)]
        with ThreadPoolExecutor(sequences) as pool:
            done = list(pool.map(lambda stream: stream.collect(), streams))
        seconds = time.perf_counter() - begin
        assert all(len(generation.token_ids) == new_tokens for generation in done)
        return seconds

    return generate


def _report(figures: dict[str, dict[str, list[float]]], cores: list[int]) -> None:
    peer = figures["transformers"]
    rows: list[list[object]] = []
    ratios: dict[str, dict[str, float]] = {}
    for work in peer:
        row: list[object] = [work, median(peer[work])]
        for name in figures:
            if name == "transformers":
                continue
            pairs = [ours / theirs for ours, theirs in zip(figures[name][work], peer[work], strict=True)]
            ratios.setdefault(name, {})[work] = median(pairs)
            row += [median(figures[name][work]), median(pairs)]
        rows.append(row)
    columns = ["bfloat16, tokens/s", "transformers"]
    for name in ratios:
        columns += [name, "ratio"]
    show(f"SmolLM2-135M, {len(cores)} cores, medians", columns, rows)
    write(
        "offline", {"machine": machine(cores), "tokens_per_second": figures, "ratio_to_transformers": ratios}
    )


if __name__ == "__main__":
    main()
