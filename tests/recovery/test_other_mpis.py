"""MPICH and Intel MPI, each in an environment of its own: a world of two ranks serves, a rank of it is killed, and
the next one takes over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.recovery.served import Served, Streams, processes_of, still_there
from tests.tiny_models import make_tiny_llama

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PACKAGES = {"mpich": "mpich==5.0.2", "intel": "impi-rt==2021.18.1"}
NUM_TOKENS = 600


def environment_with(mpi: str) -> Path:
    """Its python. The wheel of the MPI and mpi4py are its own, everything else is that of these tests. Skips where
    the wheels cannot be had."""
    folder = ROOT / "build" / "mpis" / mpi
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        command = [python, "-m", "pip", "install", "-q", PACKAGES[mpi], "mpi4py==4.1.2"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if answer.returncode != 0:
            pytest.skip(f"{PACKAGES[mpi]} cannot be installed: {answer.stderr.strip().splitlines()[-1]}")
        packages = folder / sysconfig.get_path("purelib", vars={"base": "."})
        (packages / "of_these_tests.pth").write_text(f"{Path(sysconfig.get_path('purelib')).resolve()}\n")
        complete.touch()
    return python


@pytest.mark.parametrize("mpi", ["mpich", "intel"])
def test_world_is_replaced(mpi: str, tmp_path: Path) -> None:
    python = environment_with(mpi)
    model = make_tiny_llama(tmp_path / "tiny", max_model_len=2048)
    path = f"{python.parent}:{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    shape = ["--mpi", mpi, "--tp", "2", "--kv-cache-memory", "16MiB", "--dtype", "float32", "--spare", "none"]
    segments = set(Path("/dev/shm").glob("*mpi*"))
    with Served(str(model), tmp_path / "run", *shape, python=str(python), variables=variables) as served:
        world = served.active_world()
        undisturbed = Streams(served, ["Once"], NUM_TOKENS).finish()[0]
        assert undisturbed.done and undisturbed.error is None
        libraries = Path(f"/proc/{world['ranks'][1]['pid']}/maps").read_text()
        assert f"build/mpis/{mpi}/lib/libmpi" in libraries  # not that of these tests
        dead = processes_of(world)
        streams = Streams(served, ["Once", "Twice"], NUM_TOKENS)
        streams.wait_begun(8)
        os.kill(world["ranks"][1]["pid"], signal.SIGKILL)
        finished = streams.finish()
        assert served.active_world(above=world["epoch"])["epoch"] == world["epoch"] + 1
        assert not still_there(dead)
        assert [stream.error for stream in finished] == [None, None]
        assert finished[0].text == undisturbed.text
        everything = served.processes()
        assert served.stop() == 0
        assert not still_there(everything)
        assert served.shm_folders() == []
    assert set(Path("/dev/shm").glob("*mpi*")) <= segments
