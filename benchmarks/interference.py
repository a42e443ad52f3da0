"""What running streams feel when a long prompt comes in: time between tokens of 8 streams, before and meanwhile.

`python -m benchmarks.interference [--rounds N] [--tp N] [--pp N]`. The peer in the same run is the same streams
without the prompt. A prompt is cut into chunks, so that a stream waits for one step at most between two tokens; how
long that is, is bounded by the step factor, and 0 is without the bound.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from itertools import pairwise

from benchmarks.common import bare_world, machine, model_folder, percentile, pin, show, write
from benchmarks.peers.work import prompt
from gateway.client import Client
from gateway.protocol import SamplingParams

STREAMS = 8
STREAM_TOKENS = 400
PROMPT_TOKENS = 6000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--factors", type=float, nargs="+", default=[0.0, 4.0])
    arguments = parser.parse_args()
    cores = pin(arguments.cores)
    rows: list[list[object]] = []
    result: dict[str, object] = {}
    for factor in arguments.factors:
        options = ("--step-factor", f"{factor:g}")
        with (
            bare_world(model_folder(), arguments.tp, arguments.pp, *options) as endpoint,
            # Steps without a bound may take longer than a client waits for a sign of life.
            Client(endpoint, silence_s=300.0) as client,
        ):
            alone: list[float] = []
            beside: list[float] = []
            first_tokens: list[float] = []
            for salt in range(arguments.rounds):
                quiet, busy, first_token_s = _round(client, salt)
                alone += quiet
                beside += busy
                first_tokens.append(first_token_s)
        milliseconds = [
            percentile(alone, 0.5) * 1e3,
            percentile(alone, 0.99) * 1e3,
            percentile(beside, 0.5) * 1e3,
            percentile(beside, 0.99) * 1e3,
            max(beside) * 1e3,
        ]
        first_token_s = percentile(first_tokens, 0.5)
        rows.append(
            [
                f"step factor {factor:g}" if factor else "no bound",
                *milliseconds,
                first_token_s,
                milliseconds[2] / milliseconds[0],
            ]
        )
        result[f"{factor:g}"] = {
            "alone_ms": {"p50": milliseconds[0], "p99": milliseconds[1]},
            "beside_long_prompt_ms": {"p50": milliseconds[2], "p99": milliseconds[3], "max": milliseconds[4]},
            "long_prompt_first_token_s": first_token_s,
        }
    columns = ["", "alone p50", "p99", "beside p50", "p99", "max", "prompt TTFT s", "ratio p50"]
    show(
        f"time between tokens of {STREAMS} streams, ms; a prompt of {PROMPT_TOKENS} tokens comes in",
        columns,
        rows,
    )
    write(
        "interference",
        {
            "machine": machine(cores),
            "tp": arguments.tp,
            "pp": arguments.pp,
            "load": os.getloadavg(),
            "step_factors": result,
        },
    )


def _round(client: Client, salt: int) -> tuple[list[float], list[float], float]:
    """Seconds between tokens before the prompt came and until its first token; and that token's wait."""
    arrivals: list[list[float]] = [[] for _ in range(STREAMS)]
    params = SamplingParams(max_tokens=STREAM_TOKENS, temperature=0.0, ignore_eos=True)
    streams = [client.submit(prompt(i, 32, 1000 + salt), params) for i in range(STREAMS)]

    def read(index: int) -> None:
        arrivals[index] += [time.perf_counter() for _ in streams[index]]

    readers = [threading.Thread(target=read, args=(index,)) for index in range(STREAMS)]
    for reader in readers:
        reader.start()
    time.sleep(2.0)
    begin = time.perf_counter()
    long_prompt = client.submit(
        prompt(99, PROMPT_TOKENS, salt), SamplingParams(max_tokens=1, temperature=0.0)
    )
    next(iter(long_prompt))
    end = time.perf_counter()
    for stream in streams:
        stream.cancel()
    for reader in readers:
        reader.join()
    quiet: list[float] = []
    busy: list[float] = []
    for times in arrivals:
        for earlier, later in pairwise(times[1:]):
            if later < begin:
                quiet.append(later - earlier)
            elif later <= end:
                busy.append(later - earlier)
    return quiet, busy, end - begin


if __name__ == "__main__":
    main()
