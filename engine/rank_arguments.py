"""The command line of a rank: its flags and their defaults.

Called by `engine.rank` before anything that takes long is imported; it must import nothing but the standard library.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Without `argv` those of the process. Exits with code 2 and a usage line where they cannot be read."""
    cache = Path(
        os.environ.get("PHALANX_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "phalanx"
    )
    parser = argparse.ArgumentParser(
        prog="python -m engine.rank",
        description="One rank of a world. Start tp * pp of them with mpirun; rank 0 then serves ZeroMQ clients.",
    )
    parser.add_argument("--model", type=Path, required=True, help="model folder in Hugging Face format")
    parser.add_argument(
        "--served-model-name", default="", help="name that clients see (default: the folder's)"
    )
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks of each stage")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages")
    parser.add_argument(
        "--expert-parallel",
        action="store_true",
        help="each tensor-parallel rank holds whole experts, not some columns of each",
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="type of weights and activations",
    )
    parser.add_argument(
        "--backend",
        choices=["auto", "phalanx", "deepspeed"],
        default="auto",
        help="what computes the layers: our decoder, or transformers cut by DeepSpeed AutoTP (--tp only)",
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="where ranks compute"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="compute threads of this rank (default: OMP_NUM_THREADS, else cores / ranks of the host)",
    )
    parser.add_argument(
        "--max-model-len", type=int, default=0, help="tokens of prompt and output (default: the model's)"
    )
    parser.add_argument(
        "--max-num-seqs", type=int, default=0, help="sequences that run at the same time (default: 64)"
    )
    parser.add_argument(
        "--max-num-batched-tokens", type=int, default=0, help="tokens of one step (default: 1024)"
    )
    parser.add_argument(
        "--kv-cache-memory",
        type=int,
        default=0,
        help="bytes of KV cache on each rank (default: 40 %% of the free memory of the host, divided by its ranks)",
    )
    parser.add_argument(
        "--kv-cache-blocks",
        type=int,
        default=0,
        help="blocks of 16 tokens in the KV cache, in place of --kv-cache-memory",
    )
    parser.add_argument(
        "--memory-share",
        type=float,
        default=1.0,
        help="share of the default KV cache, for worlds that are not alone on their host",
    )
    parser.add_argument(
        "--step-factor",
        type=float,
        default=4.0,
        help="how many times as long as a decode step one may take that computes prompts beside streams; 0: no bound",
    )
    parser.add_argument(
        "--kernels",
        default=os.environ.get("PHALANX_KERNELS") or "auto",
        help="instruction set of the native kernels (amx_bf16, avx512_bf16, avx512, avx2, portable), auto for the "
        "best, off for torch (default: PHALANX_KERNELS, else auto)",
    )
    parser.add_argument(
        "--quantization",
        choices=["none", "int8", "int4"],
        default="none",
        help="what the matrices are rounded to when they are cut (CPUs, with native kernels)",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits for a request whatever runs beside it, and after a replay",
    )
    parser.add_argument(
        "--shard-cache", type=Path, default=cache / "shards", help="where cut weights are kept"
    )
    parser.add_argument("--gateway-curve-dir", type=Path, help="folder of CURVE keys (phalanx curve-keygen)")
    parser.add_argument(
        "--gateway-insecure", action="store_true", help="other machines may connect without CURVE"
    )
    parser.add_argument("--gateway", default="tcp://127.0.0.1:5555", help="ZeroMQ endpoint of rank 0")
    parser.add_argument("--epoch", type=int, default=1, help="number of this world")
    arguments = parser.parse_args(argv)
    arguments.max_num_seqs = arguments.max_num_seqs or 64
    arguments.max_num_batched_tokens = arguments.max_num_batched_tokens or 1024
    return arguments
