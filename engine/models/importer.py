"""Turns a GGUF file into a folder in Hugging Face format, once: weights as bfloat16, config, tokenizer; beside them
the blocks of matrices whose numbers the native kernels can take as they are.

Called by the catalog. Imports numpy and gguf, never torch. The folder is written aside and renamed when it is
whole, so that nobody ever sees half of it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.models.errors import ModelError
from engine.models.locks import locked
from engine.models.safetensors_header import TensorEntry, lay_out
from engine.models.source_blocks import BLOCK_INPUTS, BLOCK_TYPES, BLOCKS_FILE

if TYPE_CHECKING:
    from io import FileIO

    from numpy.typing import NDArray

    from engine.models.config import ModelConfig
    from engine.models.gguf_families import GgufFamily
    from engine.models.gguf_file import GgufFile
    from engine.models.gguf_tensors import Target

IMPORT_VERSION = 3
"""To be raised whenever the same GGUF file is turned into another folder; older ones are made anew."""

_NOTE = "phalanx_import.json"

TensorProgress = Callable[[int, int], None]
"""Is told (tensors done, tensors in all)."""


def import_gguf(path: Path, folder: Path, source_hash: str, progress: TensorProgress) -> None:
    """Makes `folder` from the GGUF file at `path`, unless an import of the same content is there already.

    `source_hash` identifies the content. Several processes may call this at once: one works, the others wait.
    Raises ModelError for files that are damaged or of a kind that is not supported.
    """
    if is_imported(folder, source_hash):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock"), waiting=lambda: None) as lock:
        if is_imported(folder, source_hash):
            return
        for leftover in folder.parent.glob(f".{folder.name}.*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        aside.mkdir()

        def advance(done: int, total: int) -> None:
            lock.beat()
            progress(done, total)

        try:
            _write_folder(path, aside, advance)
            note = {"version": IMPORT_VERSION, "source": path.name, "source_sha256": source_hash}
            (aside / _NOTE).write_text(json.dumps(note))
            for file in [*aside.iterdir(), aside]:
                _sync(file)  # a folder that is seen after a power cut is a whole one
            if folder.exists():
                folder.rename(aside.with_name(f"{aside.name}.old.partial"))
            aside.rename(folder)
            _sync(folder.parent)
        finally:
            for leftover in folder.parent.glob(f".{folder.name}.*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)


def import_folder(models: Path, name: str, source_hash: str) -> Path:
    """Where in `models` the import of that content is, or is to go: in the folder `name`, unless that holds another
    import. Such a one stays as it is: a deployment may serve from it, whose next front and world read it again."""
    plain = models / name
    if is_imported(plain, source_hash) or not plain.exists():
        return plain
    return models / f"{name}-{source_hash[:12]}-v{IMPORT_VERSION}"


def is_imported(folder: Path, source_hash: str) -> bool:
    """Whether `folder` is a whole import of that content, made by this version of the importer."""
    try:
        note = json.loads((folder / _NOTE).read_bytes())
        return bool(note["version"] == IMPORT_VERSION and note["source_sha256"] == source_hash)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_folder(path: Path, folder: Path, progress: TensorProgress) -> None:
    from engine.models.config import ModelConfig
    from engine.models.gguf_families import family_of, model_config
    from engine.models.gguf_file import GgufFile
    from engine.models.gguf_tensors import targets
    from engine.models.gguf_tokenizer import write_tokenizer
    from engine.models.gguf_tokens import end_token_ids, special_token_id

    progress(0, 0)
    gguf = GgufFile(path)
    name, family = family_of(gguf)
    config = model_config(gguf, name, family)
    ends = end_token_ids(gguf)
    config |= {
        "bos_token_id": special_token_id(gguf, "bos"),
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": special_token_id(gguf, "padding"),
    }
    # The cheap files first: what cannot be imported is refused before the long work.
    write_tokenizer(gguf, folder, config["max_position_embeddings"])
    file = folder / "config.json"
    file.write_text(json.dumps(config, indent=2))
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {key: config[key] for key in names if config[key] is not None}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
    try:
        checked = ModelConfig.from_folder(folder)
        found = targets(gguf, family, checked)
    except ModelError as error:
        # What the metadata came to is not what the user has before them.
        raise ModelError(str(error).replace(str(file), f"{path}, as {file.name}")) from None
    _write_weights(gguf, family, checked, found, folder / "model.safetensors", progress)
    _write_blocks(gguf, family, checked, found, folder / BLOCKS_FILE)


def _write_weights(
    gguf: GgufFile,
    family: GgufFamily,
    config: ModelConfig,
    found: list[Target],
    file: Path,
    progress: TensorProgress,
) -> None:
    from engine.models.gguf_file import to_bfloat16
    from engine.models.gguf_tensors import rows

    layout = lay_out((TensorEntry(target.name, "BF16", target.shape) for target in found), {})
    with file.open("wb", buffering=0) as written:
        written.write(layout.header)
        for done, target in enumerate(found):
            progress(done, len(found))
            for part in rows(gguf, family, config, target):
                _write(written, to_bfloat16(part))
        progress(len(found), len(found))


def _write_blocks(
    gguf: GgufFile, family: GgufFamily, config: ModelConfig, found: list[Target], file: Path
) -> None:
    """The quantized matrices, reordered but not changed, uint8 `[rows, blocks of a row, bytes of a block]`."""
    from engine.models.gguf_tensors import stored_rows

    kept: dict[TensorEntry, Target] = {}
    for target in found:
        if gguf.type_name(target.source) in BLOCK_TYPES and len(target.shape) == 2:
            num_rows, num_inputs = target.shape
            num_blocks = num_inputs // BLOCK_INPUTS
            block_bytes = gguf.row_bytes(target.source) // num_blocks
            kept[TensorEntry(target.name, "U8", (num_rows, num_blocks, block_bytes))] = target
    if not kept:
        return
    with file.open("wb", buffering=0) as written:
        written.write(lay_out(kept, {}).header)
        for target in kept.values():
            for part in stored_rows(gguf, family, config, target):
                _write(written, part)


def _write(file: FileIO, values: NDArray[Any]) -> None:
    data = values.reshape(-1).view("uint8").data
    while data:  # one write call takes 2 GiB at most
        data = data[file.write(data) :]
