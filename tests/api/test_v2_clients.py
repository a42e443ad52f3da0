"""The packages that speak the Open Inference Protocol V2, as published, against a real server. Each has its own
environment under build/, made by the first run: what they pin never enters ours."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.api.conftest import MODEL
from tests.client_environments import client_environment
from tests.recovery.served import Served

CLIENTS = {"tritonclient": "tritonclient[http,grpc]==2.73.0", "kserve": "kserve==0.21.0"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("package", list(CLIENTS))
def test_package_works_unchanged(served: Served, package: str) -> None:
    found = re.search(r"  grpc (\S+)$", served.ready_line)
    assert found, served.ready_line
    script = Path(__file__).parent / "v2_clients" / f"with_{package}.py"
    command = [client_environment(CLIENTS[package]), script, urlsplit(served.url).netloc, found[1], MODEL]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables)
    assert done.returncode == 0, done.stderr
