"""Many requests that come, go and are cancelled at random: every answer is the one that the request alone gets."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import phalanx
from tests import references
from tests.references import References

NUM_PROMPTS = 7
LONG = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize(
    ("options", "num_requests"),
    [
        pytest.param({"tp": 2}, 60, id="tp2"),
        pytest.param({"tp": 2}, 600, id="tp2-long", marks=LONG),
        pytest.param({"pp": 2}, 600, id="pp2-long", marks=LONG),
    ],
)
def test_every_request_gets_its_own_answer(options: dict[str, int], num_requests: int) -> None:
    oracle = references.load()
    # A small cache and a small step: sequences wait, are chunked and are preempted.
    limits = {"max_num_seqs": 12, "max_num_batched_tokens": 64, "kv_cache_memory": "12MiB"}
    with (
        phalanx.serve(references.MODEL, dtype="float32", **options, **limits) as server,
        server.client() as client,
    ):

        def ask(number: int) -> None:
            chance = random.Random(number)
            name = chance.randrange(NUM_PROMPTS)
            max_tokens = chance.randint(1, 40)
            params = phalanx.SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
            stream = client.submit(oracle.prompts[name], params)
            cancel_after = chance.randint(1, max_tokens) if chance.random() < 0.2 else None
            tokens: list[int] = []
            reason = None
            for output in stream:
                assert output.position == len(tokens) or not output.token_ids
                tokens += output.token_ids
                reason = output.finish_reason
                if cancel_after is not None and len(tokens) >= cancel_after:
                    stream.cancel()
            assert reason == "length" or (reason == "cancelled" and cancel_after is not None)
            assert reason == "cancelled" or len(tokens) == max_tokens
            _check(oracle, name, tokens)

        with ThreadPoolExecutor(24) as pool:
            for done in [pool.submit(ask, number) for number in range(num_requests)]:
                done.result()
        stats = client.stats
    assert stats is None or stats.num_running == 0


def _check(oracle: References, name: int, tokens: list[int]) -> None:
    """Equal to the oracle, up to a position where its two best logits lie within 1e-3 of each other."""
    for index, (ours, theirs) in enumerate(zip(tokens, oracle.tokens[name], strict=False)):
        if ours != theirs:
            best = np.sort(oracle.logits[name, index])[-2:]
            assert best[1] - best[0] < 1e-3, f"prompt {name} differs at token {index}"
            return
