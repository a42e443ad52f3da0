"""Builds the native kernels: each instruction set's translation unit with its own flags, then one shared object.

Called by setup.py, and as `python -m engine.kernels.compile` to build in place. Standard library only, since
nothing is installed yet when it runs. It never fails an installation: torch computes what kernels would.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
LIBRARY = Path(__file__).parent / "_native.so"

_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wno-psabi", "-ffp-contract=off"]
"""Without contraction: a multiply-add is fused where the source says so, or rows would differ by their tile."""
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
_X86 = {"avx2": ["-mavx2", "-mfma"], "avx512": _AVX512}
_AVX512_BF16 = {"avx512_bf16": [*_AVX512, "-mavx512bf16", "-mavx512vnni"]}
_AMX = [*_AVX512_BF16["avx512_bf16"], "-DPHALANX_AMX"]
_AMX_BF16 = {
    "amx_bf16": [*_AMX, "-mamx-tile", "-mamx-bf16"],
    "amx_emulated": [*_AMX, "-DPHALANX_AMX_EMULATED"],  # for tests on processors without
}
_AMX_PROGRAM = b"#include <immintrin.h>\nvoid dot() { _tile_dpbf16ps(0, 1, 2); }\n"
_TIMEOUT_S = 300


class CompileError(Exception):
    """The kernels could not be built. The text says why."""


def source_hash() -> str:
    """Identifies what the library is built from."""
    digest = hashlib.sha256()
    for file in [Path(__file__), *sorted(SOURCES.iterdir())]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def build(library: Path = LIBRARY) -> None:
    """Compiles the kernels for every instruction set that the compiler knows. Raises CompileError."""
    compiler = _compiler()
    instruction_sets: dict[str, list[str]] = {"portable": []}
    macros = [f'-DPHALANX_SOURCE_HASH="{source_hash()}"']
    if platform.machine().lower() in ("x86_64", "amd64"):
        instruction_sets |= _X86
        macros.append("-DPHALANX_X86")
        if _accepts(compiler, _AVX512_BF16["avx512_bf16"]):
            instruction_sets |= _AVX512_BF16
            macros.append("-DPHALANX_AVX512_BF16")
            if platform.system() == "Linux" and _accepts(compiler, _AMX_BF16["amx_bf16"], _AMX_PROGRAM):
                instruction_sets |= _AMX_BF16
                macros.append("-DPHALANX_AMX_BF16")
    units = [("isa.cpp", name, [*flags, f"-DPHALANX_ISA={name}"]) for name, flags in instruction_sets.items()]
    units += [("dispatch.cpp", "dispatch", macros), ("threads.cpp", "threads", [])]
    if "amx_bf16" in instruction_sets:
        units.append(("amx_probe.cpp", "amx_probe", []))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = [str(Path(folder, f"{name}.o")) for _, name, _ in units]
        commands = [
            [*compiler, *_FLAGS, *flags, "-c", str(SOURCES / source), "-o", target]
            for (source, _, flags), target in zip(units, objects, strict=True)
        ]
        for _ in pool.map(_run, commands):
            pass
        # Aside and renamed, so that a process that has the old one mapped keeps it whole.
        aside = library.with_name(f"{library.name}.{os.getpid()}.partial")
        try:
            _run([*compiler, "-shared", "-pthread", *objects, "-o", str(aside)])
            os.replace(aside, library)
        finally:
            aside.unlink(missing_ok=True)


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise CompileError(
        f"CXX={shlex.join(named)} was not found" if named else "no C++ compiler (c++, g++, clang++) was found"
    )


def _accepts(compiler: list[str], flags: list[str], program: bytes = b"") -> bool:
    """Its assembler, too, which may be older than the compiler."""
    command = [*compiler, *flags, "-x", "c++", "-c", "-o", os.devnull, "-"]
    return subprocess.run(command, input=program, capture_output=True, timeout=_TIMEOUT_S).returncode == 0


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{command[0]}: {error}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise CompileError(f"{shlex.join(command[:1])} failed: {lines[0] if lines else done.returncode}")


def main() -> int:
    try:
        build()
    except CompileError as error:
        print(f"phalanx: the native kernels were not built: {error}", file=sys.stderr)
        return 1
    print(f"built {LIBRARY}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
