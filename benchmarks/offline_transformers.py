"""The peer of benchmarks/offline.py: reads `sequences prompt_tokens new_tokens` lines, answers with seconds."""

from __future__ import annotations

import sys
import time

import torch
from transformers import AutoModelForCausalLM

from benchmarks.offline import prompt


def main(folder: str, threads: int) -> None:
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for line in sys.stdin:
        sequences, prompt_tokens, new_tokens = map(int, line.split())
        ids = torch.tensor([prompt(i, prompt_tokens) for i in range(sequences)])
        begin = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        print(time.perf_counter() - begin, flush=True)
        assert out.shape[1] == prompt_tokens + new_tokens


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
