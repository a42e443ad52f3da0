"""Environments of their own for published packages whose pins must not enter ours, made when a test first asks."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ENVIRONMENTS = Path(__file__).parents[1] / "build" / "client-environments"


def client_environment(requirement: str) -> Path:
    """The Python of the environment that has this requirement."""
    folder = ENVIRONMENTS / re.sub(r"[^\w.]+", "-", requirement)
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", requirement], check=True, timeout=900)
        (folder / ".ready").touch()
    return python
