"""How near the native kernels come to what the processor can do with a prompt: `python -m benchmarks.prompt_limit`.

The layers of SmolLM2-135M with random weights over 1024 tokens, part by part, beside the instruction that multiplies
bfloat16 at its best in the same seconds, for the clock of a shared machine changes by the minute. With one thread and
with one for each core. Needs AVX-512 BF16 and a C++ compiler. Results: benchmarks/results/prompt_limit.json.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

from benchmarks.common import ROOT, machine, pin, show, write
from engine.kernels.compile import SOURCES

PARTS = (
    "queries, keys, values",
    "output",
    "gate and up, activation",
    "down",
    "attention",
    "all of a prompt's layers",
)
FLAGS = ["-O3", "-std=c++17", "-Wno-psabi", "-ffp-contract=off", "-pthread", "-mfma"]
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
BFLOAT16_FLAGS = ["-mavx512bf16", "-mavx512vnni", "-DPHALANX_X86", "-DPHALANX_ISA=avx512_bf16"]
TOKENS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cores", type=int, default=2)
    cores = pin(parser.parse_args().cores)
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "prompt_limit"
        sources = [str(ROOT / "benchmarks" / "prompt_limit.cpp"), str(SOURCES / "threads.cpp")]
        command = [
            "c++",
            *FLAGS,
            *AVX512_FLAGS,
            *BFLOAT16_FLAGS,
            f"-I{SOURCES}",
            *sources,
            "-o",
            str(program),
        ]
        subprocess.run(command, check=True)
        for threads in (1, len(cores)):
            figures[threads] = _measured(program, threads)
    write("prompt_limit", {"machine": machine(cores), "threads": figures})


def _measured(program: Path, threads: int) -> dict[str, object]:
    lines = subprocess.run([str(program), str(threads)], check=True, capture_output=True, text=True).stdout
    first, *rest = lines.splitlines()
    peak = float(first) * threads
    rates, rows = {}, []
    for part, line in zip(PARTS, rest, strict=True):
        flop, took_s = map(float, line.split())
        rates[part] = flop / took_s
        rows.append([part, took_s * 1e3, flop / took_s / 1e9, f"{flop / took_s / peak:.0%}"])
    show(
        f"{threads} thread{'s' * (threads > 1)}: the instruction's best is {peak / 1e9:.0f} GFLOP/s; "
        f"{TOKENS / took_s:,.0f} tokens/s",
        ["", "ms", "GFLOP/s", "of the best"],
        rows,
    )
    return {"peak_flop_per_s": peak, "flop_per_s": rates, "tokens_per_s": TOKENS / took_s}


if __name__ == "__main__":
    main()
