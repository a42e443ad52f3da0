"""The native library: found, checked against its sources, its functions typed, and what it can run on this machine.

Called by `bindings`, by the rank before it joins a world, and by tests. Nothing here knows what functions are given.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from ctypes import c_char_p, c_float, c_int64, c_void_p
from functools import cache

from engine.kernels.compile import LIBRARY, SOURCES, source_hash

INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_emulated", "amx_bf16")
"""The better ones last. What runs one runs those before it, but for the emulated one, which is for tests."""


class KernelsUnavailable(Exception):
    """There are no native kernels here. The text says why, and what would help."""


@cache
def load() -> ctypes.CDLL:
    """The library, the same one each time. Raises KernelsUnavailable."""
    remedy = "run `pip install -e .` with a C++ compiler (or `python -m engine.kernels.compile`)"
    if not os.path.exists(LIBRARY):
        raise KernelsUnavailable(f"the native kernels were not built; {remedy}")
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise KernelsUnavailable(f"the native kernels cannot be loaded ({error}); {remedy}") from None
    library.phalanx_source_hash.restype = c_char_p
    if SOURCES.is_dir() and library.phalanx_source_hash().decode() != source_hash():
        raise KernelsUnavailable(f"the native kernels were built from other sources; {remedy}")
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "phalanx_instruction_set": (c_char_p, [c_int64]),
        "phalanx_functions": (c_void_p, [c_char_p]),
        "phalanx_amx_refused": (c_char_p, []),
        "phalanx_survives_probe": (c_int64, [c_char_p]),
        "phalanx_open": (c_void_p, [c_int64]),
        "phalanx_close": (None, [c_void_p]),
        "phalanx_parts": (
            None,
            [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p],
        ),
        "phalanx_linear": (None, [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64]),
        "phalanx_norm": (
            None,
            [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_float, c_void_p],
        ),
        "phalanx_embed": (
            None,
            [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float, c_void_p],
        ),
        "phalanx_logits": (
            None,
            [*[c_void_p] * 4, c_int64, c_void_p, c_float, c_float, c_float, c_void_p],
        ),
        "phalanx_greatest": (
            None,
            [*[c_void_p] * 4, c_int64, c_void_p, c_float, c_float, c_float, c_void_p, c_void_p],
        ),
        "phalanx_sum_shared": (c_int64, [c_void_p, c_void_p, c_void_p, c_int64]),
        "phalanx_summed_parts": (c_int64, [*[c_void_p] * 4, c_int64, c_int64, c_void_p, c_void_p]),
    }  # fmt: skip
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def instruction_sets() -> list[str]:
    """What this machine can run, the best first, without what is only for tests. Raises KernelsUnavailable."""
    library = load()
    names: list[str] = []
    while (name := library.phalanx_instruction_set(len(names))) is not None:
        names.append(name.decode())
    return names


def find() -> None:
    """Loads the library and finds what runs here, if it is there. It may start a child process to try AMX, which is
    nothing for a process that has joined a world."""
    with contextlib.suppress(KernelsUnavailable):
        instruction_sets()


def runs(instruction_set: str) -> bool:
    """Whether it can be named, by `--kernels`. Raises KernelsUnavailable."""
    return bool(load().phalanx_functions(instruction_set.encode()))


def survives_probe(instruction_set: str) -> bool:
    """Whether a child process multiplies rightly with it, whatever the processor says of itself. Raises
    KernelsUnavailable, and KeyError for one that this library does not have."""
    survived: int = load().phalanx_survives_probe(instruction_set.encode())
    if survived < 0:
        raise KeyError(instruction_set)
    return bool(survived)


def refused_amx() -> str | None:
    """Why AMX is not used though the processor names it. Raises KernelsUnavailable."""
    reason: bytes | None = load().phalanx_amx_refused()
    return None if reason is None else reason.decode()
