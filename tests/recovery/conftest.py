"""What the recovery tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.recovery.small_world.deployed import Deployment, Start


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
