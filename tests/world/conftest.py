"""A world for the tests of this folder: every rank of one mpirun builds it once and runs each test together."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from engine.collectives.mpi import join_world
from engine.world import World
from tests import references


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tp", type=int, default=1)
    parser.addoption("--pp", type=int, default=1)


@pytest.fixture(scope="session")
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    joined = join_world(request.config.getoption("--tp"), request.config.getoption("--pp"))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    yield joined
    joined.control.barrier()


@pytest.fixture(scope="session")
def oracle() -> references.References:
    return references.load()
