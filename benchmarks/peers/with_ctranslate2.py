"""CTranslate2, weights in int8. Arguments: model folder, folder of the converted model (made if missing), threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers.work import answer


def make() -> Callable[[list[list[int]], int], int]:
    import ctranslate2
    from transformers import AutoTokenizer

    folder, converted, threads = sys.argv[1:4]
    if not Path(converted, "model.bin").exists():
        converter = Path(sys.executable).with_name("ct2-transformers-converter")
        command = [
            str(converter),
            "--model",
            folder,
            "--output_dir",
            converted,
            "--quantization",
            "int8",
            "--force",
        ]
        subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = ctranslate2.Generator(
        converted, device="cpu", compute_type="int8", intra_threads=int(threads)
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> int:
        results = generator.generate_batch(
            [tokenizer.convert_ids_to_tokens(ids) for ids in prompts],
            max_length=new_tokens, min_length=new_tokens, sampling_topk=1, include_prompt_in_result=False,
            max_batch_size=0, end_token=[],
        )  # fmt: skip
        return sum(len(result.sequences_ids[0]) for result in results)

    return generate


if __name__ == "__main__":
    answer(make)
