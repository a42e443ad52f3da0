"""The native kernels for tests: built if they are not there, or older than their sources."""

from __future__ import annotations

from engine.kernels import compile, library


def instruction_sets() -> list[str]:
    """What this machine can run, the best first."""
    try:
        return library.instruction_sets()
    except library.KernelsUnavailable:
        compile.build()
        library.load.cache_clear()
        return library.instruction_sets()


def every_instruction_set() -> list[str]:
    """And what is never chosen by itself: AMX without the processor."""
    return [*instruction_sets(), *(["amx_emulated"] if library.runs("amx_emulated") else [])]
