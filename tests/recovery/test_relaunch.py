"""The promise: ranks of a real model are killed and frozen in mid-stream, and no stream shows it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from tests import references
from tests.recovery.run_processes import left_of
from tests.recovery.served import Served, Stream, Streams, processes_of, still_there, watch_health

NUM_TOKENS = references.NUM_TOKENS
MARGIN = 1e-3
"""Where the two best logits of the undisturbed run lie this close, either may win."""

FAULTS = [signal.SIGKILL, signal.SIGSTOP]


SHAPES = [
    pytest.param(2, 1, id="tp2-pp1"),
    pytest.param(1, 2, id="tp1-pp2", marks=pytest.mark.slow),
    pytest.param(2, 2, id="tp2-pp2", marks=[pytest.mark.slow, pytest.mark.long]),
]


@pytest.mark.parametrize(("tp", "pp"), SHAPES)
def test_streams_outlive_every_rank(tmp_path: Path, tp: int, pp: int) -> None:
    """Each rank of one deployment is killed and frozen in turn, each time in the middle of 8 streams."""
    shape = ["--tp", str(tp), "--pp", str(pp)]
    flags = [*shape, "--dtype", "float32", "--kv-cache-memory", "128MiB", "--spare", "none"]
    with Served(references.MODEL, tmp_path, *flags) as served:
        for rank in range(tp * pp):
            for number in FAULTS:
                hit_in_mid_stream(served, rank, number)


@pytest.mark.parametrize(
    ("tp", "pp", "kind"),
    [
        pytest.param(2, 1, "warm", id="tp2-pp1-warm"),
        pytest.param(2, 1, "hot", id="tp2-pp1-hot", marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param(1, 2, "warm", id="tp1-pp2-warm", marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_streams_pass_to_the_spare(tmp_path: Path, tp: int, pp: int, kind: str) -> None:
    """The same with a spare: it is the one that takes over, and another one comes up."""
    shape = ["--tp", str(tp), "--pp", str(pp)]
    flags = [*shape, "--dtype", "float32", "--kv-cache-memory", "128MiB", "--spare", kind]
    with Served(references.MODEL, tmp_path, *flags) as served:
        for number, rank in zip([*FAULTS, *FAULTS], [0, tp * pp - 1, tp * pp - 1, 0], strict=True):
            spare = served.parked_spare(above=served.active_world()["epoch"])
            hit_in_mid_stream(served, rank, number, spare)
        served.parked_spare(above=spare["epoch"])
        everything = served.processes()
        assert len(everything) == 1 + 2 * (1 + 2 * tp * pp)
        assert served.stop() == 0
        assert left_of(everything) == []
        assert served.shm_folders() == []


def hit_in_mid_stream(
    served: Served, rank: int, number: signal.Signals, spare: dict[str, Any] | None = None
) -> None:
    case = f"rank {rank}, {number.name}"
    world = served.active_world()
    dead = processes_of(world)
    streams = Streams(served, references.PROMPTS, NUM_TOKENS)
    streams.wait_begun(8)
    with watch_health(served) as health:
        os.kill(world["ranks"][rank]["pid"], number)
        finished = streams.finish()
        new_world = served.active_world(above=world["epoch"])
    assert not still_there(dead), case
    assert new_world["epoch"] == world["epoch"] + 1, case
    if spare is None:
        assert served.shm_folders() == [f"phalanx-{served.run_id}-{new_world['epoch']}"], case
        assert 503 in health.ready, case
    else:
        assert (new_world["epoch"], pids(new_world)) == (spare["epoch"], pids(spare)), case
        assert f"phalanx-{served.run_id}-{world['epoch']}" not in served.shm_folders(), case
    for index, stream in enumerate(finished):
        check(stream, index, case)
    assert health.live == [200] and health.ready[-1] == 200, case
    fault = served.cluster()["faults"][0]
    assert fault["kind"] == {signal.SIGKILL: "killed", signal.SIGSTOP: "frozen"}[number], case
    assert fault["rank"] == rank and fault["epoch"] == world["epoch"], case


def pids(world: dict[str, Any]) -> list[int]:
    return [entry["pid"] for entry in world["ranks"]]


def test_front_that_dies_refuses_nobody(tmp_path: Path) -> None:
    with Served(references.MODEL, tmp_path) as served:
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


def check(stream: Stream, index: int, case: str) -> None:
    """That a stream brought the whole of the undisturbed run, each token once."""
    assert stream.error is None and stream.done and stream.finish_reason == "length", (case, stream)
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
        f"{case}: stream {index} differs from the undisturbed run at token {position}, where the margin is "
        f"{best[1] - best[0]:.4f}:\n{stream.text!r}\n{whole!r}"
    )


def test_undisturbed_run_is_the_reference(tmp_path: Path) -> None:
    """Without this, the comparison above would also pass if every run were wrong in the same way."""
    with Served(references.MODEL, tmp_path, "--tp", "1", "--dtype", "float32") as deployment:
        for index, stream in enumerate(Streams(deployment, references.PROMPTS, NUM_TOKENS).finish()):
            check(stream, index, "undisturbed")
