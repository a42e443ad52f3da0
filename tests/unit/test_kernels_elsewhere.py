"""The portable kernels on another processor: built for ARM and run by an emulator, bit for bit what they give here.

Needs g++ for ARM and QEMU (Debian: g++-aarch64-linux-gnu, qemu-user); is skipped without."""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from engine.kernels.compile import _FLAGS, SOURCES

PROGRAM = Path(__file__).parents[1] / "kernels_elsewhere.cpp"
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def _build(compiler: str, flags: list[str], program: Path) -> None:
    sources = [PROGRAM, *(SOURCES / name for name in ("isa.cpp", "dispatch.cpp", "threads.cpp"))]
    macros = ["-DPHALANX_ISA=portable", '-DPHALANX_SOURCE_HASH="test"']
    command = [
        compiler,
        *_FLAGS,
        *flags,
        *macros,
        "-static",
        f"-I{SOURCES}",
        *map(str, sources),
        "-o",
        str(program),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which(ARM_COMPILER) is None
    or shutil.which(ARM_EMULATOR) is None
    or platform.machine() != "x86_64",
    reason=f"{ARM_COMPILER} and {ARM_EMULATOR} are not there, or this is no x86-64",
)
def test_arm_computes_the_same_bits(tmp_path: Path) -> None:
    # ARM always has a fused multiply-add; here it is asked for, in vectors of the same width.
    with ThreadPoolExecutor(2) as pool:
        list(
            pool.map(
                _build,
                ("c++", ARM_COMPILER),
                (["-mfma"], []),
                (tmp_path / "here", tmp_path / "there"),
            )
        )
    here, there = (
        np.frombuffer(
            subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=300).stdout, np.float32
        )
        for command in ([tmp_path / "here"], [ARM_EMULATOR, tmp_path / "there"])
    )
    one_thread, three_threads = there.reshape(2, -1)
    assert np.array_equal(one_thread, three_threads)
    assert np.isfinite(there).all() and np.ptp(there) > 1.0
    assert np.array_equal(here, there)
