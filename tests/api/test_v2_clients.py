"""The packages that speak the Open Inference Protocol V2, as published, against a real server. Each has its own
environment under build/, made by the first run: what they pin never enters ours."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.api.conftest import MODEL
from tests.recovery.served import Served

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / "build" / "client-environments"
CLIENTS = {"tritonclient": "tritonclient[http,grpc]==2.73.0", "kserve": "kserve==0.21.0"}


def environment(package: str) -> Path:
    """The Python of the package's environment."""
    requirement = CLIENTS[package]
    folder = ENVIRONMENTS / re.sub(r"[^\w.]+", "-", requirement)
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", requirement], check=True, timeout=900)
        (folder / ".ready").touch()
    return python


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("package", list(CLIENTS))
def test_package_works_unchanged(served: Served, package: str) -> None:
    found = re.search(r"  grpc (\S+)$", served.ready_line)
    assert found, served.ready_line
    script = Path(__file__).parent / "v2_clients" / f"with_{package}.py"
    command = [environment(package), script, urlsplit(served.url).netloc, found[1], MODEL]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables)
    assert done.returncode == 0, done.stderr
