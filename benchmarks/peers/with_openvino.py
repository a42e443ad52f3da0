"""OpenVINO GenAI, which reads the GGUF file itself. Arguments: GGUF file, threads."""

from __future__ import annotations

import sys
from collections.abc import Callable

from benchmarks.peers.work import answer


def make() -> Callable[[list[list[int]], int], int]:
    import numpy as np
    import openvino
    import openvino_genai

    file, threads = sys.argv[1:3]
    pipeline = openvino_genai.LLMPipeline(file, "CPU", INFERENCE_NUM_THREADS=int(threads))

    def generate(prompts: list[list[int]], new_tokens: int) -> int:
        ids = openvino.Tensor(np.array(prompts, dtype=np.int64))
        mask = openvino.Tensor(np.ones((len(prompts), len(prompts[0])), dtype=np.int64))
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.min_new_tokens = new_tokens, new_tokens
        config.ignore_eos, config.do_sample = True, False
        result = pipeline.generate(openvino_genai.TokenizedInputs(ids, mask), config)
        return sum(len(tokens) for tokens in result.tokens)

    return generate


if __name__ == "__main__":
    answer(make)
