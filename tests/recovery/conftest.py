"""What the recovery tests share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import LauncherError
from launcher.run_dir import RunDir
from tests.recovery.small_world.deployed import Deployment, Start

# A run under nohup or in a shell's background inherits these as ignored, and so would every server that the tests
# start and stop.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Deployment] = []

    def begin(behaviour: str = "", spare: str = "none", must_start: bool = True, **more: Any) -> Deployment:
        deployment = Deployment(tmp_path / "run", behaviour, spare, **more)
        started.append(deployment)
        assert deployment.has_started or not must_start, deployment.errors.read_text()
        return deployment

    yield begin
    for deployment in started:
        if deployment.process.poll() is None:
            deployment.stop()
    try:
        run_dir = RunDir(tmp_path / "run")
    except LauncherError:
        return
    run_dir.remove_leftovers()  # of a test that failed without a supervisor
    run_dir.close()
