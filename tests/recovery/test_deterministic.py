"""`--deterministic` in bfloat16: a stream that a fault disturbed is bit for bit the undisturbed one, seeded too."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from gateway.client import Client, Stream
from gateway.protocol import Output, SamplingParams
from tests import references
from tests.recovery.served import Served

NUM_TOKENS = 48

Entry = tuple[int, float]
"""A token and its log-probability, as the model gave it."""


@pytest.mark.parametrize(
    ("tp", "pp"),
    [
        pytest.param(2, 1, id="tp2-pp1"),
        pytest.param(3, 1, id="tp3-pp1", marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param(2, 2, id="tp2-pp2", marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_a_disturbed_stream_is_the_undisturbed_one(tmp_path: Path, tp: int, pp: int) -> None:
    prompts = references.load().prompts
    flags = ["--tp", str(tp), "--pp", str(pp), "--dtype", "bfloat16", "--deterministic", "--spare", "none"]
    with Served(references.MODEL, tmp_path, *flags, "--kv-cache-memory", "128MiB") as served:
        with Client(served.ready_line.split()[3]) as client:
            alone = [_entries(_ask(client, number, prompt)) for number, prompt in enumerate(prompts)]
        assert len({tuple(token for token, _ in entries) for entries in alone}) == len(prompts)
        for rank in range(tp * pp):
            world = served.active_world()
            with Client(served.ready_line.split()[3]) as client:
                streams = [_ask(client, number, prompt) for number, prompt in enumerate(prompts)]
                begun = [[next(stream) for _ in range(3 + rank)] for stream in streams]
                os.kill(world["ranks"][rank]["pid"], signal.SIGKILL)
                for number, stream in enumerate(streams):
                    found = _entries(stream, begun[number])
                    assert found == alone[number], f"prompt {number}, rank {rank} killed"
            assert served.active_world(above=world["epoch"])["epoch"] > world["epoch"]


def _ask(client: Client, number: int, prompt: list[int]) -> Stream:
    temperature = 0.0 if number % 2 else 0.9
    return client.submit(
        prompt,
        SamplingParams(
            max_tokens=NUM_TOKENS, temperature=temperature, seed=number, ignore_eos=True, logprobs=0
        ),
    )


def _entries(stream: Stream, begun: list[Output] | None = None) -> list[Entry]:
    entries = []
    for output in [*(begun or []), *stream]:
        assert output.logprobs is not None or not output.token_ids
        entries += [(entry.token_id, entry.logprob) for entry in output.logprobs or []]
    return entries
