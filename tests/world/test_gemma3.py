"""The real Gemma 3 270M on this shape of world against transformers: one KV head, windows, 262,144 tokens.

Run by `python -m tests.world.run --gemma3`, since it fetches 240 MB the first time.
"""

from __future__ import annotations

import numpy as np

from engine.world import World
from tests import gemma3_references
from tests.gemma3_references import COLUMN_STEP, NUM_TOKENS
from tests.world import driver


def test_greedy_tokens_and_logits(world: World) -> None:
    reference = gemma3_references.load()
    engine = driver.build(
        world,
        reference.folder,
        dtype="float32",
        max_model_len=2048,
        max_num_seqs=4,
        max_num_batched_tokens=256,
        kv_cache_bytes=128 * 2**20,
    )
    requests = [driver.request(row, prompt, NUM_TOKENS) for row, prompt in enumerate(reference.prompts)]
    run = driver.serve(world, engine, requests, record_logits=True)
    if world.at.is_sampler:
        worst = 0.0
        for row, prompt in enumerate(reference.prompts):
            for index in range(NUM_TOKENS):
                ours = run.logits[row, len(prompt) + index][::COLUMN_STEP]
                worst = max(worst, float(np.abs(ours - reference.logits[row, index]).max()))
        print(f"gemma3-270m: logits differ by {worst:.2g} at most")
        assert worst < 1e-3
    if world.at.rank == 0:
        assert [run.tokens[row] for row in range(len(reference.prompts))] == reference.tokens
