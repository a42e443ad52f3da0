"""Which kernels compute, and what is said where none can."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.engine import ConfigurationError, EngineSettings, _choose_kernels
from engine.kernels.bindings import Kernels
from engine.models.config import ExpertConfig, ModelConfig
from engine.models.sharding import shard_world
from tests.native_kernels import instruction_sets
from tests.unit.test_kernels_stage import PLAIN

SETTINGS = EngineSettings(model_dir=Path("model"), shard_cache=Path("cache"))
CPU = torch.device("cpu")
EXPERTS = replace(PLAIN, experts=ExpertConfig(4, 2, True, "mlp", ("gate", "up", "down")))


def _choose(
    settings: EngineSettings, config: ModelConfig, device: torch.device = CPU
) -> tuple[Kernels | None, str]:
    return _choose_kernels(settings, config, shard_world(config, 1, 1), device)


def test_the_best_instruction_set_computes_unless_another_is_named() -> None:
    best = instruction_sets()[0]
    kernels, line = _choose(SETTINGS, PLAIN)
    assert kernels is not None and kernels.instruction_set == best
    assert best in line and "native kernels" in line
    kernels, _ = _choose(replace(SETTINGS, kernels="portable"), PLAIN)
    assert kernels is not None and kernels.instruction_set == "portable"
    kernels, _ = _choose(SETTINGS, EXPERTS)
    assert kernels is not None


@pytest.mark.parametrize(
    ("settings", "config", "device", "why"),
    [
        (replace(SETTINGS, kernels="off"), PLAIN, CPU, "PHALANX_KERNELS=off"),
        (SETTINGS, replace(EXPERTS, intermediate_size=50), CPU, "experts of a width"),
        (SETTINGS, PLAIN, torch.device("cuda"), "for CPUs"),
    ],
)
def test_torch_computes_where_kernels_cannot_and_deterministic_is_refused(
    settings: EngineSettings, config: ModelConfig, device: torch.device, why: str
) -> None:
    kernels, line = _choose(settings, config, device)
    assert kernels is None
    assert line.startswith("torch") and why in line
    with pytest.raises(ConfigurationError, match=f"--deterministic needs the native kernels: .*{why}"):
        _choose(replace(settings, deterministic=True), config, device)


def test_a_library_that_was_not_built_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.kernels import bindings

    instruction_sets()
    bindings._library.cache_clear()
    monkeypatch.setattr(bindings, "LIBRARY", Path("/nowhere/_native.so"))
    try:
        kernels, line = _choose(SETTINGS, PLAIN)
        assert kernels is None and "pip install" in line
        with pytest.raises(ConfigurationError, match=r"python -m engine\.kernels\.compile"):
            _choose(replace(SETTINGS, deterministic=True), PLAIN)
    finally:
        bindings._library.cache_clear()


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="--kernels sse9 does not run on this machine"):
        _choose(replace(SETTINGS, kernels="sse9"), PLAIN)
