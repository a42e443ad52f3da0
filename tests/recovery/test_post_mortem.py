"""What can be read of a fault afterwards: in /cluster, in the metrics, in `phalanx status`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.recovery.served import Served, Streams
from tests.tiny_models import make_tiny_llama


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", max_model_len=2048)


def fault_of(served: Served, file: Path, what: str) -> dict[str, Any]:
    """The record of one fault on purpose, in the middle of streams, once everything about it is known."""
    world = served.active_world()
    streams = Streams(served, ["Once", "upon"], 1500)  # they are to run still when the file is read
    streams.wait_begun(2)
    file.write_text(f"{what} epoch={world['epoch']}")
    assert all(stream.error is None and stream.done for stream in streams.finish())
    served.active_world(above=world["epoch"])
    fault: dict[str, Any] = served.cluster()["faults"][0]
    assert fault["epoch"] == world["epoch"] and fault["phase"] == "stepping" and fault["step"] > 0
    assert fault["pid"] == world["ranks"][fault["rank"]]["pid"]
    assert fault["host"] == world["ranks"][fault["rank"]]["host"]
    times = [fault[name] for name in ("detect_s", "abort_s", "recover_s", "resume_s", "progress_age_s")]
    assert None not in times and min(times) >= 0
    assert fault["in_flight"] == len(fault["in_flight_ids"]) == 2
    for stream in streams.all:
        assert any(stream.call_id.endswith(name) for name in fault["in_flight_ids"]), (stream.call_id, fault)
    return fault


def test_every_fault_leaves_a_record(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "faults"
    monkeypatch.setenv("PHALANX_FAULTS", f"@{file}")
    with Served(str(tiny_model), tmp_path / "run", "--tp", "2", "--kv-cache-memory", "16MiB") as served:
        fault = fault_of(served, file, "segv rank=1 collective=2")
        assert (fault["kind"], fault["signal"], fault["exit_code"]) == ("killed", "SIGSEGV", None)
        assert (fault["rank"], fault["tp"], fault["pp"], fault["collective"]) == (1, 1, 0, 2)
        assert "Segmentation fault" in fault["stacks"] and "engine/faults.py" in fault["stacks"]

        fault = fault_of(served, file, "raise=unheard-of rank=0")
        assert (fault["kind"], fault["signal"], fault["exit_code"]) == ("exit", None, 1)
        assert fault["last_lines"].endswith("PHALANX_FAULTS: unheard-of")
        assert fault["stacks"].startswith("Traceback") and "step_loop.py" in fault["stacks"]

        fault = fault_of(served, file, "hang rank=0")
        assert (fault["kind"], fault["signal"], fault["exit_code"]) == ("hung", None, None)
        assert "engine/faults.py" in fault["stacks"] and "step_loop.py" in fault["stacks"]
        assert fault["progress_age_s"] > 2

        metrics = httpx.get(f"{served.url}/metrics").text
        for kind in ("killed", "exit", "hung"):
            assert f'phalanx_faults_total{{kind="{kind}",model="tiny"}} 1.0' in metrics
        for name in ("detect", "abort", "recovery", "resume"):
            assert f'phalanx_fault_{name}_seconds_count{{model="tiny"}} 3.0' in metrics
        command = [sys.executable, "-m", "launcher.cli", "status", "--url", served.url]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "tp 1, pp 0 on" in shown and "first token again after" in shown
        assert "it said: engine.faults.InjectedFault: PHALANX_FAULTS: unheard-of" in shown
