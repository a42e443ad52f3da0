"""Deployments of small ranks over the hosts of a test, ended with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.cluster.namespaces import Cluster
from tests.recovery.small_world.deployed import Deployment

Begin = Callable[..., Deployment]
"""Starts one: a digit for each host, how many ranks it may have, and what else Deployment takes."""


@contextmanager
def deployments(folder: Path, hosts: Cluster, **common: Any) -> Iterator[Begin]:
    """`common`: what all of them are given, in place of the hosts' own variables too."""
    started: list[Deployment] = []

    def start(slots: str, **more: Any) -> Deployment:
        named = ",".join(f"{name}:{count}" for name, count in zip(hosts.names, slots, strict=False))
        options = {"prefix": hosts.prefix, "variables": hosts.variables, **common, **more}
        deployment = Deployment(folder / "run", hosts=named, **options)
        started.append(deployment)
        assert deployment.has_started, deployment.errors.read_text()
        return deployment

    try:
        yield start
    finally:
        for deployment in started:
            if deployment.process.poll() is None:
                deployment.stop()
