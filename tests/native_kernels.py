"""The native kernels for tests: built if they are not there, or older than their sources."""

from __future__ import annotations

from engine.kernels import bindings, compile


def instruction_sets() -> list[str]:
    """What this machine can run, the best first."""
    try:
        return bindings.instruction_sets()
    except bindings.KernelsUnavailable:
        compile.build()
        bindings._library.cache_clear()
        return bindings.instruction_sets()


def every_instruction_set() -> list[str]:
    """And what is never chosen by itself: AMX without the processor."""
    return [*instruction_sets(), *(["amx_emulated"] if bindings.runs("amx_emulated") else [])]
