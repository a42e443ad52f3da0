"""What the benchmarks share: the machine, the model, worlds without supervisor, tables and results."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MODEL = "smollm2-135m-instruct"


def model_folder(model: str = MODEL) -> Path:
    """The model in the model cache, fetched and imported if need be."""
    command = [
        sys.executable,
        "-m",
        "engine.models.prepare",
        model,
        "--tp",
        "1",
        "--pp",
        "1",
        "--dtype",
        "auto",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return Path(json.loads(done.stdout.splitlines()[-1])["path"])


def machine(cores: list[int]) -> dict[str, object]:
    """What the figures were measured on."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores_used": len(cores),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "date": time.strftime("%Y-%m-%d"),
    }


def pin(count: int) -> list[int]:
    """Restricts this process and its children to `count` cores, so that everybody gets the same."""
    cores = sorted(os.sched_getaffinity(0))[:count]
    os.sched_setaffinity(0, cores)
    return cores


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def mpirun(ranks: int, segments: str) -> list[str]:
    beside = Path(sys.executable).with_name("mpirun")
    crowded = ["--mca", "mpi_yield_when_idle", "1"] if ranks >= len(os.sched_getaffinity(0)) else []
    return [
        str(beside) if beside.exists() else "mpirun", "--oversubscribe", "--bind-to", "none",
        "--mca", "pml", "ob1", "--mca", "btl", "self,sm", "--mca", "btl_sm_backing_directory", segments,
        *crowded, "-np", str(ranks),
    ]  # fmt: skip


def mpi_environment() -> dict[str, str]:
    return {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@contextmanager
def bare_world(
    folder: Path, tp: int, pp: int = 1, *options: str, cores: list[int] | None = None
) -> Iterator[str]:
    """A world under mpirun alone, without front and supervisor, on all cores of this process or on some of them.
    Yields rank 0's ZeroMQ endpoint."""
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    segments = tempfile.mkdtemp(prefix="phalanx-bench-", dir="/dev/shm")
    on_cores = ["taskset", "-c", ",".join(map(str, cores))] if cores else []
    command = [
        *on_cores, *mpirun(tp * pp, segments), sys.executable, "-m", "engine.rank", "--model", str(folder),
        "--tp", str(tp), "--pp", str(pp), "--gateway", endpoint, *options,
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env=mpi_environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.startswith("ready"):
            raise RuntimeError(f"the world did not start: {line!r}, exit code {process.wait()}")
        yield endpoint
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(segments, ignore_errors=True)


def median(values: list[float]) -> float:
    return statistics.median(values)


def percentile(values: list[float], share: float) -> float:
    """Nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def show(title: str, columns: list[str], rows: list[list[object]]) -> None:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(f"{value:,.2f}" if isinstance(value, float) else str(value) for value in row))
    Console(width=110).print(table)


def write(name: str, result: dict[str, object]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {file.relative_to(ROOT)}")
