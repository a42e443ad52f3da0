"""Environments of their own for published packages whose pins must not enter ours, made when a test first asks."""

from __future__ import annotations

import fcntl
import re
import shutil
import subprocess
import sys
from pathlib import Path

ENVIRONMENTS = Path(__file__).parents[1] / "build" / "client-environments"


def client_environment(requirement: str) -> Path:
    """The Python of the environment that has this requirement, or several, by spaces. Run its tools with `-m`: the
    scripts in its `bin` name the folder in which they were made, and a checkout may move."""
    folder = ENVIRONMENTS / re.sub(r"[^\w.]+", "-", requirement)
    python = folder / "bin" / "python"
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two runs at once the second one waits for the first one's work
        if not (folder / ".ready").exists():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            subprocess.run(
                [python, "-m", "pip", "install", "-q", *requirement.split()], check=True, timeout=900
            )
            (folder / ".ready").touch()
    return python
