"""llama.cpp through llama-cpp-python, one sequence at a time (its binding has no batches). Arguments: GGUF file,
threads."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

from benchmarks.peers.work import answer

CONTEXT_TOKENS = 2048


def make() -> Callable[[list[list[int]], int], int]:
    from llama_cpp import Llama

    file, threads = sys.argv[1:3]
    model = Llama(
        file,
        n_ctx=CONTEXT_TOKENS,
        n_threads=int(threads),
        n_threads_batch=int(threads),
        n_batch=512,
        verbose=False,
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> int:
        made = 0
        for ids in prompts:
            model.reset()
            made += len(list(itertools.islice(model.generate(ids, top_k=1, temp=0.0), new_tokens)))
        return made

    return generate


if __name__ == "__main__":
    answer(make)
