"""The weight files of a model folder: which they are, where each tensor lies, and what their content is.

Called by the loader and by `prepare`. Imports no torch and writes nothing into the model folder.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from engine.models.config import ModelConfig
from engine.models.content_hash import Advance, ContentHashes
from engine.models.errors import ModelError
from engine.models.safetensors_header import TensorEntry, read_header
from engine.models.sharding import SourceSlice, local_tensors, shard_world
from engine.models.source_blocks import SourceBlocks

_INDEX = "model.safetensors.index.json"

SOURCE_TYPES = ("F32", "BF16", "F16")
"""Of tensors, as the safetensors format names them."""


class SourceFiles:
    """The safetensors files of a folder, single or with an index. Raises ModelError where there are none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, str] | None = None
        index = folder / _INDEX
        if index.is_file():
            self._file_of = _read_index(index)
            self.paths = [folder / name for name in sorted(set(self._file_of.values()))]
            self._hashed = [*self.paths, index]
        else:
            single = folder / "model.safetensors"
            self.paths = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
            if not self.paths:
                hint = ""
                if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
                    hint = "; it has pickled weights, which are never read: convert them to safetensors"
                raise ModelError(f"{folder} holds no *.safetensors files{hint}")
            if len(self.paths) > 1:
                raise ModelError(
                    f"{folder} holds {len(self.paths)} *.safetensors files but neither model.safetensors nor "
                    f"{_INDEX}, which says what belongs to the model; fetch the model again"
                )
            self._hashed = self.paths
        self.blocks = SourceBlocks(folder)
        if self.blocks.path.is_file():
            self._hashed = [*self._hashed, self.blocks.path]
        for path in self.paths:
            if not path.is_file():
                raise ModelError(f"{path} is missing, and {_INDEX} names it; fetch the model again")

    def file_of(self, tensor: str) -> Path:
        """The file that holds a tensor, or should hold it. Raises ModelError for one that the index lacks."""
        if self._file_of is None:
            return self.paths[0]
        name = self._file_of.get(tensor)
        if name is None:
            raise ModelError(f"{self.folder / _INDEX}: tensor {tensor} is missing; the model is not complete")
        return self.folder / name

    def check(self, config: ModelConfig) -> None:
        """Reads the headers and raises ModelError if a tensor that the model needs is missing, has another
        shape than the config gives it, or is of a type that is not supported."""
        headers = {path: read_header(path) for path in self.paths}
        whole = shard_world(config, tp=1, pp=1)[0][0]
        for tensor in local_tensors(config, whole, tp_rank=0):
            for piece in tensor.slices:
                path = self.file_of(piece.name)
                check_tensor(path, headers[path].get(piece.name), piece)

    def check_headers(self) -> None:
        """Raises ModelError for a file that is broken or cut short, whatever it holds."""
        for path in self.paths:
            read_header(path)

    def known_identity(self, hashes: ContentHashes) -> str | None:
        """The identity, if none of the files has changed since it was computed; None otherwise."""
        contents = [hashes.known(path) for path in self._hashed]
        return self._combine([content for content in contents if content is not None])

    def bytes_to_hash(self, hashes: ContentHashes) -> int:
        """Bytes that `identity` will read."""
        return sum(path.stat().st_size for path in self._hashed if hashes.known(path) is None)

    def identity(self, hashes: ContentHashes, advance: Advance) -> str:
        """SHA-256 over the names and contents of all files, which are read unless their hashes are known."""
        contents = [hashes.compute(path, advance) for path in self._hashed]
        hashes.save()
        combined = self._combine(contents)
        assert combined is not None
        return combined

    def _combine(self, contents: list[str]) -> str | None:
        if len(contents) != len(self._hashed):
            return None
        lines = [f"{path.name}\0{content}\0" for path, content in zip(self._hashed, contents, strict=True)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_tensor(path: Path, entry: TensorEntry | None, piece: SourceSlice) -> None:
    """Raises ModelError unless the tensor that `path` holds is the one that the piece is cut from."""
    if entry is None:
        raise ModelError(f"{path}: tensor {piece.name} is missing; the model is not complete")
    if entry.shape != piece.shape:
        raise ModelError(
            f"{path}: tensor {piece.name} has shape {list(entry.shape)}, and config.json makes it "
            f"{list(piece.shape)}; the two don't belong together"
        )
    if entry.dtype not in SOURCE_TYPES:
        raise ModelError(
            f"{path}: tensor {piece.name} is of type {entry.dtype}; supported are {', '.join(SOURCE_TYPES)}"
        )


def _read_index(index: Path) -> dict[str, str]:
    try:
        names = dict(json.loads(index.read_bytes())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index} is not a valid index of safetensors files: {error!r}") from None
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(
                f"{index}: weight_map holds {name!r}; the name of a file in that folder is allowed"
            )
    return names
