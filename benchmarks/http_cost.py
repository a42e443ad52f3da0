"""What supervisor, front and HTTP cost under load: 32 streams over HTTP beside 32 of a bare world, which is asked for
token ids directly and returns them.

`python -m benchmarks.http_cost [--tp N] [--rounds N] [--cores N]`. Each round starts both, in turn, on the same
cores, which the load generator shares, and gives them the same load as `benchmarks.serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import uvloop
from tokenizers import Tokenizer

import phalanx
from benchmarks.common import MODEL, bare_world, machine, median, model_folder, pin, show, write
from benchmarks.serve import Ask, Reply, _http_clients, _load, _prompts
from gateway.async_client import AsyncClient
from gateway.protocol import SamplingParams

STREAMS, REQUESTS = 32, 3
TARGET = 0.8
"""Tokens per second over HTTP, of those of the bare world."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2)
    arguments = parser.parse_args()
    folder = model_folder()
    cores = pin(arguments.cores)
    prompts = _prompts()
    rates: dict[str, list[float]] = {"http": [], "bare": []}
    for number in range(arguments.rounds):
        for name in sorted(rates, reverse=number % 2 == 1):
            if name == "http":
                with phalanx.serve(MODEL, tp=arguments.tp, spare="none") as server:
                    rates[name].append(uvloop.run(_over_http(server, prompts)))
            else:
                with bare_world(folder, arguments.tp) as endpoint:
                    rates[name].append(uvloop.run(_directly(endpoint, folder, prompts)))
        print(
            f"round {number + 1}: " + ", ".join(f"{n} {r[-1]:.0f}" for n, r in rates.items()), file=sys.stderr
        )
    ratios = [http / bare for http, bare in zip(rates["http"], rates["bare"], strict=True)]
    ratio = median(ratios)
    show(
        f"SmolLM2-135M, bfloat16, tp {arguments.tp}, {len(cores)} cores, {STREAMS} streams",
        ["", "tokens/s"],
        [["over HTTP", median(rates["http"])], ["bare world", median(rates["bare"])], ["ratio", ratio]],
    )
    print(f"target: {TARGET}: {'met' if ratio >= TARGET else 'MISSED'}")
    write(
        "http_cost",
        {
            "machine": machine(cores), "tp": arguments.tp, "streams": STREAMS, "tokens_per_second": rates,
            "ratios": ratios, "ratio": ratio, "target": TARGET,
        },
    )  # fmt: skip


async def _over_http(server: phalanx.Server, prompts: Iterator[str]) -> float:
    async with _http_clients(server, STREAMS) as asks:
        return await _rate(asks, prompts)


async def _directly(endpoint: str, folder: Path, prompts: Iterator[str]) -> float:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    async with AsyncClient(endpoint) as client:

        async def ask(prompt: str, new_tokens: int) -> Reply:
            params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
            reply = Reply(time.perf_counter())
            async for output in client.submit(tokenizer.encode(prompt).ids, params):
                reply.num_tokens += len(output.token_ids)
                reply.arrivals.append(time.perf_counter())
            return reply

        return await _rate([ask] * STREAMS, prompts)


async def _rate(asks: list[Ask], prompts: Iterator[str]) -> float:
    await asyncio.gather(*(ask(next(prompts), 4) for ask in asks))  # warm-up
    return median((await _load(asks, REQUESTS, prompts)).tokens_per_second)


if __name__ == "__main__":
    main()
