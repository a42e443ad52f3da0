"""A rank that leaves out a transfer in mid-stream must not make others compute with those of another step: the world
stops, is found hung and replaced, and no stream shows it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests import references
from tests.recovery.served import Served, Streams
from tests.recovery.test_relaunch import NUM_TOKENS, check


@pytest.mark.parametrize(
    ("tp", "pp", "ranks"),
    [
        pytest.param(1, 2, [0, 0], id="tp1-pp2"),
        pytest.param(2, 1, [0, 1], id="tp2-pp1", marks=pytest.mark.slow),
        pytest.param(2, 2, [0, 1, 2, 3], id="tp2-pp2", marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_no_token_of_a_step_that_lacks_a_transfer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tp: int, pp: int, ranks: list[int]
) -> None:
    faults = tmp_path / "faults"
    monkeypatch.setenv("PHALANX_FAULTS", f"@{faults}")
    flags = ["--tp", str(tp), "--pp", str(pp), "--dtype", "float32", "--kv-cache-memory", "128MiB"]
    with Served(references.MODEL, tmp_path / "run", *flags) as served:
        for number, rank in enumerate(ranks):
            world = served.active_world()
            streams = Streams(served, references.PROMPTS, NUM_TOKENS)
            streams.wait_begun(6)
            mark = tmp_path / f"mark-{number}"
            (tmp_path / "new").write_text(f"skip rank={rank} epoch={world['epoch']} mark={mark}\n")
            (tmp_path / "new").rename(faults)
            finished = streams.finish(180)
            assert mark.with_name(f"{mark.name}.1").exists()
            served.active_world(above=world["epoch"])
            fault = served.cluster()["faults"][0]
            assert (fault["kind"], fault["epoch"]) == ("hung", world["epoch"])
            for index, stream in enumerate(finished):
                check(stream, index, f"rank {rank} left out a transfer")
            faults.unlink()
            time.sleep(0.1)
