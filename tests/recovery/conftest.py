"""What the recovery tests share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.recovery.small_world.deployed import Deployment, Start

# A run under nohup or in a shell's background inherits these as ignored, and so would every server that the tests
# start and stop.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Deployment] = []

    def begin(behaviour: str = "", spare: str = "none") -> Deployment:
        started.append(Deployment(tmp_path / "run", behaviour, spare))
        return started[-1]

    yield begin
    for deployment in started:
        if deployment.process.poll() is None:
            deployment.stop()
