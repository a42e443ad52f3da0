"""Runs the world tests, one mpirun for each shape.

`python -m tests.world.run [--quick | --rest | --gemma3 | tp,pp ...]`
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import (
    family_references,
    gemma3_references,
    native_kernels,
    other_architectures,
    pooling_references,
    references,
)

BACKENDS = "tests/world/backends"
BACKEND_SHAPES = [(1, 1), (2, 1), (3, 1)]
"""Of the tests in `tests/world/backends`, which run by themselves: what they import takes seconds."""
SHAPES = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2), (1, 3)]
QUICK_SHAPES = [(2, 1), (1, 2)]
"""One of each kind of parallelism, as many ranks as small machines have cores."""
GEMMA3 = "tests/world/test_gemma3.py"
"""Fetches 240 MB, and is run on request only."""
GEMMA3_SHAPES = [(1, 1), (2, 1), (1, 2)]


def main(arguments: list[str]) -> int:
    native_kernels.instruction_sets()  # builds them if need be
    if arguments == ["--quick"]:
        shapes = QUICK_SHAPES
    elif arguments == ["--rest"]:
        shapes = [shape for shape in SHAPES if shape not in QUICK_SHAPES]
    elif arguments != ["--gemma3"]:
        shapes = [(int(a), int(b)) for a, b in (argument.split(",") for argument in arguments)] or SHAPES
    if arguments == ["--gemma3"]:
        gemma3_references.load()
        failed = [shape for shape in GEMMA3_SHAPES if not _run(*shape, [GEMMA3])]
    else:
        references.load()
        family_references.load()
        pooling_references.load()
        others = ["tests/world", f"--ignore={GEMMA3}", f"--ignore={BACKENDS}"]
        failed = [shape for shape in shapes if not _run(*shape, others)]
    if arguments == ["--rest"]:
        other_architectures.load()
        failed += [shape for shape in BACKEND_SHAPES if not _run(*shape, [BACKENDS])]
    if failed:
        print("world tests failed on (tp, pp) " + ", ".join(map(str, failed)))
    return 1 if failed else 0


def _run(tp: int, pp: int, tests: list[str]) -> bool:
    ranks = tp * pp
    mpirun = Path(sys.executable).with_name("mpirun")
    segments = tempfile.mkdtemp(prefix="phalanx-test-", dir="/dev/shm")
    command = [
        str(mpirun) if mpirun.exists() else "mpirun",
        "--oversubscribe", "--bind-to", "none",
        "--mca", "pml", "ob1", "--mca", "btl", "self,sm", "--mca", "btl_sm_backing_directory", segments,
        # A rank that waits gives its core away, also when only other programs want it.
        "--mca", "mpi_yield_when_idle", "1",
        "-np", str(ranks),
        sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "--with-mpi",
        *tests, "--tp", str(tp), "--pp", str(pp),
    ]  # fmt: skip
    # One thread a rank: on a machine that does other things, too, several wait for each other most of the time.
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    begin = time.monotonic()
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        output, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as expired:
        output, code = f"{expired.stdout!r}", -1
    finally:
        shutil.rmtree(segments, ignore_errors=True)
    verdict = "passed" if code == 0 else "FAILED"
    print(f"{tests[0]} (tp {tp}, pp {pp}): {verdict} in {time.monotonic() - begin:.1f} s", flush=True)
    if code != 0:
        print(output, flush=True)
    return code == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
