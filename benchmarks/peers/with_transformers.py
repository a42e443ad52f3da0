"""transformers, bfloat16. Arguments: model folder, threads."""

from __future__ import annotations

import sys
from collections.abc import Callable

from benchmarks.peers.work import answer


def make() -> Callable[[list[list[int]], int], int]:
    import torch
    from transformers import AutoModelForCausalLM

    folder, threads = sys.argv[1:3]
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def generate(prompts: list[list[int]], new_tokens: int) -> int:
        ids = torch.tensor(prompts)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return int((out.shape[1] - ids.shape[1]) * out.shape[0])

    return generate


if __name__ == "__main__":
    answer(make)
