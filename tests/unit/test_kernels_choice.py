"""Which kernels compute, and what is said where none can."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.engine import ConfigurationError, EngineSettings, _choose_kernels
from engine.kernels import library
from tests.native_kernels import every_instruction_set, instruction_sets

SETTINGS = EngineSettings(model_dir=Path("model"), shard_cache=Path("cache"))
CPU = torch.device("cpu")


def test_the_best_instruction_set_computes_unless_another_is_named() -> None:
    best = instruction_sets()[0]
    kernels, line = _choose_kernels(SETTINGS, CPU)
    assert kernels is not None and kernels.instruction_set == best
    assert best in line and "native kernels" in line
    kernels, _ = _choose_kernels(replace(SETTINGS, kernels="portable"), CPU)
    assert kernels is not None and kernels.instruction_set == "portable"


@pytest.mark.parametrize(
    ("settings", "device", "why"),
    [
        (replace(SETTINGS, kernels="off"), CPU, "PHALANX_KERNELS=off"),
        (SETTINGS, torch.device("cuda"), "for CPUs"),
    ],
)
def test_torch_computes_where_kernels_cannot_and_deterministic_is_refused(
    settings: EngineSettings, device: torch.device, why: str
) -> None:
    kernels, line = _choose_kernels(settings, device)
    assert kernels is None
    assert line.startswith("torch") and why in line
    with pytest.raises(ConfigurationError, match=f"--deterministic needs the native kernels: .*{why}"):
        _choose_kernels(replace(settings, deterministic=True), device)


def test_a_library_that_was_not_built_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    instruction_sets()
    library.load.cache_clear()
    monkeypatch.setattr(library, "LIBRARY", Path("/nowhere/_native.so"))
    try:
        kernels, line = _choose_kernels(SETTINGS, CPU)
        assert kernels is None and "pip install" in line
        with pytest.raises(ConfigurationError, match=r"python -m engine\.kernels\.compile"):
            _choose_kernels(replace(SETTINGS, deterministic=True), CPU)
    finally:
        library.load.cache_clear()


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="--kernels sse9 does not run on this machine"):
        _choose_kernels(replace(SETTINGS, kernels="sse9"), CPU)


def test_amx_is_refused_where_a_child_that_tries_it_dies() -> None:
    """Also on processors that have none: the child's first tile is an illegal instruction."""
    if "amx_emulated" not in every_instruction_set():
        pytest.skip("built without AMX, or on a processor without AVX-512 BF16")
    assert library.survives_probe("amx_emulated")
    assert library.survives_probe("amx_bf16") is library.runs("amx_bf16")
    assert "amx_emulated" not in instruction_sets()


def test_what_is_said_of_amx_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.engine.refused_amx", lambda: "a child process that tried it failed")
    _, line = _choose_kernels(SETTINGS, CPU)
    assert "without AMX: a child process that tried it failed" in line
