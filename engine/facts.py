"""What a rank runs on and what it has loaded, in words that can be compared with those of other hosts. Called by the
rank, which leaves them for its guard; a fact that cannot be had is an empty string, never an error."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import sys
from pathlib import Path

from engine.models.content_hash import ContentHashes
from engine.models.source_files import SourceFiles


def software_facts() -> dict[str, str]:
    """Versions, as they are loaded. Known before MPI_Init: a world that cannot come together can say why."""
    import mpi4py
    import torch

    from engine.collectives.mpi import library_version

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mpi": library_version(),
        "mpi4py": mpi4py.__version__,
        "prefix": sys.prefix,
    }


def model_facts(model_dir: Path, shard_cache: Path) -> dict[str, str]:
    """The content of the weights, by the hashes that loading has left, and of the config."""
    facts = {"model": str(model_dir)}
    with contextlib.suppress(Exception):  # a backend with its own files: then nobody compares
        identity = SourceFiles(model_dir).known_identity(ContentHashes.for_source(shard_cache, model_dir))
        facts["weights"] = (identity or "")[:16]
    with contextlib.suppress(OSError):
        facts["config"] = hashlib.sha256((model_dir / "config.json").read_bytes()).hexdigest()[:16]
    return facts
