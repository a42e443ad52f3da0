"""What rounding the weights costs: perplexity of SmolLM2-135M with weights in bfloat16, int8 and int4.

`python -m benchmarks.quantization [--windows N]`. The text is the language reference that comes with Python
(`pydoc_data.topics`), in windows of 512 tokens, of which each is scored by itself. Quality does not depend on the
machine's load; speed is measured by `benchmarks.peers`.
"""

from __future__ import annotations

import argparse
import math
import sys
from pydoc_data.topics import topics

from tokenizers import Tokenizer

from benchmarks.common import bare_world, machine, model_folder, pin, show, write
from gateway.client import Client

WINDOW_TOKENS = 512
QUANTIZATIONS = ("none", "int8", "int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--cores", type=int, default=2)
    arguments = parser.parse_args()
    cores = pin(arguments.cores)
    folder = model_folder()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    stride = len(tokens) // arguments.windows
    windows = [tokens[i * stride : i * stride + WINDOW_TOKENS] for i in range(arguments.windows)]
    perplexities: dict[str, float] = {}
    for quantization in QUANTIZATIONS:
        with bare_world(folder, 1, 1, "--quantization", quantization) as endpoint, Client(endpoint) as client:
            scores = [score for window in windows for score in client.score(window[:1], window[1:])]
        perplexities[quantization] = math.exp(-sum(scores) / len(scores))
        print(f"{quantization}: {perplexities[quantization]:.4f}", file=sys.stderr)
    plain = perplexities["none"]
    show(
        f"SmolLM2-135M, perplexity over {len(windows)} x {WINDOW_TOKENS} tokens",
        ["weights", "perplexity", "ratio"],
        [
            ["bfloat16" if name == "none" else name, value, value / plain]
            for name, value in perplexities.items()
        ],
    )
    write(
        "quantization",
        {
            "machine": machine(cores), "windows": len(windows), "window_tokens": WINDOW_TOKENS,
            "perplexity": perplexities,
            "ratio": {name: value / plain for name, value in perplexities.items()},
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
