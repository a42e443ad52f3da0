"""The promise: ranks of a real model are killed and frozen in mid-stream, and no stream shows it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from tests import references
from tests.recovery.served import Served, Stream, Streams, processes_of, still_there, watch_health

NUM_TOKENS = references.NUM_TOKENS
MARGIN = 1e-3
"""Where the two best logits of the undisturbed run lie this close, either may win."""

FAULTS = [signal.SIGKILL, signal.SIGSTOP]


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tp, pp = request.param
    run_dir = tmp_path_factory.mktemp("run")
    shape = ["--tp", str(tp), "--pp", str(pp)]
    flags = [*shape, "--dtype", "float32", "--kv-cache-memory", "128MiB"]
    with Served(references.MODEL, run_dir, *flags) as deployment:
        yield deployment


def cases(tp: int, pp: int) -> list[object]:
    """Every rank, killed and frozen, all in one deployment of this shape."""
    marks = [] if (tp, pp) == (2, 1) else [pytest.mark.slow]
    return [
        pytest.param((tp, pp), rank, number, id=f"tp{tp}-pp{pp}-rank{rank}-{number.name}", marks=marks)
        for rank in range(tp * pp)
        for number in FAULTS
    ]


@pytest.mark.parametrize(
    ("served", "rank", "number"), [*cases(2, 1), *cases(1, 2), *cases(2, 2)], indirect=["served"]
)
def test_streams_outlive_a_rank(served: Served, rank: int, number: signal.Signals) -> None:
    world = served.active_world()
    dead = processes_of(world)
    streams = Streams(served, references.PROMPTS, NUM_TOKENS)
    streams.wait_begun(8)
    with watch_health(served) as health:
        os.kill(world["ranks"][rank]["pid"], number)
        finished = streams.finish()
        new_world = served.active_world(above=world["epoch"])
    assert not still_there(dead)
    assert new_world["epoch"] == world["epoch"] + 1
    assert served.shm_folders() == [f"phalanx-{served.run_id}-{new_world['epoch']}"]
    for index, stream in enumerate(finished):
        check(stream, index)
    assert health.live == [200]
    assert 503 in health.ready and health.ready[-1] == 200
    fault = served.cluster()["faults"][0]
    assert fault["kind"] == {signal.SIGKILL: "killed", signal.SIGSTOP: "frozen"}[number]
    assert fault["rank"] == rank and fault["epoch"] == world["epoch"]


@pytest.mark.parametrize("served", [(2, 1)], indirect=True)
def test_front_that_dies_refuses_nobody(served: Served) -> None:
    world = served.active_world()
    served.front().kill()
    # Accepted by the supervisor's socket, answered by the next front.
    answer = httpx.post(
        f"{served.url}/v1/completions",
        json={"model": served.model, "prompt": "1, 2, 3,", "max_tokens": 4, "temperature": 0},
        timeout=60,
    )
    assert answer.status_code == 200
    assert served.active_world()["epoch"] == world["epoch"]


def check(stream: Stream, index: int) -> None:
    """That a stream brought the whole of the undisturbed run, each token once."""
    assert stream.error is None and stream.done and stream.finish_reason == "length", stream
    assert stream.usage is not None and stream.usage["completion_tokens"] == NUM_TOKENS
    oracle = references.load()
    tokenizer = Tokenizer.from_file(str(references.model_folder() / "tokenizer.json"))
    expected = oracle.tokens[index]
    whole = tokenizer.decode(expected)
    if stream.text == whole:
        return
    # The first token that can have been another one: the text up to it is the same.
    position = 0
    while stream.text.startswith(tokenizer.decode(expected[: position + 1]).rstrip("\ufffd")):
        position += 1
    best = sorted(oracle.logits[index][position])[-2:]
    assert best[1] - best[0] < MARGIN, (
        f"stream {index} differs from the undisturbed run at token {position}, where the margin is "
        f"{best[1] - best[0]:.4f}:\n{stream.text!r}\n{whole!r}"
    )


def test_undisturbed_run_is_the_reference(tmp_path: Path) -> None:
    """Without this, the comparison above would also pass if every run were wrong in the same way."""
    with Served(references.MODEL, tmp_path, "--tp", "1", "--dtype", "float32") as deployment:
        for index, stream in enumerate(Streams(deployment, references.PROMPTS, NUM_TOKENS).finish()):
            check(stream, index)
