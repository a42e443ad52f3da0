"""Environments of clients whose pins must never enter ours: one under build/ for each package, made by the first test
that wants it, and scripts that run in them."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / "build" / "client-environments"


def environment(requirement: str) -> Path:
    """The Python of the environment that has this package."""
    folder = ENVIRONMENTS / re.sub(r"[^\w.]+", "-", requirement)
    python = folder / "bin" / "python"
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    with (ENVIRONMENTS / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".ready").exists():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            subprocess.run([python, "-m", "pip", "install", "-q", requirement], check=True, timeout=900)
            (folder / ".ready").touch()
    return python


def run_script(requirement: str, script: Path, *arguments: str, timeout_s: float = 300) -> None:
    """Runs a script in the environment of a package; it fails where the script does."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(environment(requirement)), str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
