"""vLLM's CPU backend, bfloat16, compiled as it is by default. Argument: model folder. Its cores come from the
environment, see environments.py."""

from __future__ import annotations

import sys
from collections.abc import Callable

from benchmarks.peers.work import answer


def make() -> Callable[[list[list[int]], int], int]:
    from vllm import LLM, SamplingParams

    model = LLM(model=sys.argv[1], dtype="bfloat16", max_model_len=2048, skip_tokenizer_init=True)

    def generate(prompts: list[list[int]], new_tokens: int) -> int:
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        results = model.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return sum(len(result.outputs[0].token_ids) for result in results)

    return generate


if __name__ == "__main__":
    answer(make)
