"""The weights of one rank, cut out of the model's files once and mapped into memory ever after.

Called by each rank when it loads its stage. What is cut, and how, stands in `sharding`; this module carries
it out, and never holds more than one piece of a tensor in memory of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.models.config import ModelConfig
from engine.models.errors import ModelError
from engine.models.shard_cache import FolderUse, ShardCache, locked
from engine.models.sharding import LocalTensor, RankShape, SourceSlice, local_tensors
from engine.models.source_files import SourceFiles, record_path

LAYOUT_VERSION = 1
"""To be raised whenever the bytes of a shard file change for the same source and shape."""

Progress = Callable[[int, int], None]
"""Is told (done_bytes, total_bytes)."""

_ALIGNMENT = 64
_CHUNK_BYTES = 32 * 2**20
_MADV_POPULATE_READ = 22  # Linux 5.14; Python 3.11 has no name for it

_SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_SOURCE_DTYPES = ("F32", "F16", "BF16")


def load_stage_weights(
    model_dir: Path,
    config: ModelConfig,
    shape: RankShape,
    tp_rank: int,
    tp: int,
    pp_rank: int,
    pp: int,
    dtype: torch.dtype,
    shard_cache: Path,
    progress: Progress,
) -> dict[str, Tensor]:
    """All tensors of one rank, under the local names of `sharding`, as views of one read-only mapped file.

    The first call for a source and a world's shape reads the slices that the rank needs and writes them to
    `shard_cache`; later calls map that file and copy nothing. The tensors must not be written to (the process
    would die of it), and the file stays protected from the cache's clearing while one of them lives.

    With tied weights a stage with the head holds "embed.weight" and "head.weight", which are one object.
    `progress` is called at least every 32 MiB, and every 50 ms while another process does the work.

    Raises ModelError that names the file and the tensor if the source is not what the config says, or the
    cache cannot be written.
    """
    locals_ = local_tensors(config, shape, tp_rank)
    stored = [tensor for tensor in locals_ if not _is_alias(config, shape, tensor)]
    cache = ShardCache(shard_cache)
    source = SourceFiles(model_dir)
    record = record_path(shard_cache, model_dir)

    meter = _Meter(progress)
    identity = source.recorded_identity(record)
    layout = _Layout.of(stored, dtype)
    if identity is None:
        # The file that is built afterwards is counted twice, once written and once mapped.
        meter.expect(source.bytes_to_hash(record) + 2 * layout.file_bytes)
        identity = _identity(source, record, meter)
    use = cache.use(_folder_name(identity, tp, pp, dtype))
    file = use.folder / f"stage{pp_rank}-rank{tp_rank}-{layout.digest[:12]}.safetensors"
    mapped = _map(file, layout, use)
    if mapped is None:
        meter.expect(2 * layout.file_bytes)
        mapped = _build_once(file, layout, stored, source, cache, use, dtype, meter)
    else:
        meter.expect(layout.file_bytes)
    _populate(mapped, meter)
    tensors = _views(mapped, layout, dtype)
    if config.tie_word_embeddings and shape.has_head:
        first, second = (
            ("embed.weight", "head.weight") if shape.has_embedding else ("head.weight", "embed.weight")
        )
        tensors[second] = tensors[first]
    return tensors


def _is_alias(config: ModelConfig, shape: RankShape, tensor: LocalTensor) -> bool:
    return config.tie_word_embeddings and shape.has_embedding and tensor.name == "head.weight"


def _folder_name(identity: str, tp: int, pp: int, dtype: torch.dtype) -> str:
    instruction_set = f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}".replace(" ", "")
    name = _SAFETENSORS_NAMES[dtype].lower()
    return f"{identity[:20]}-tp{tp}-pp{pp}-{name}-v{LAYOUT_VERSION}-{instruction_set}"


def _identity(source: SourceFiles, record: Path, meter: _Meter) -> str:
    """The content hash of the source; one process computes it and the others wait for it."""
    record.parent.mkdir(parents=True, exist_ok=True)
    with locked(record.with_suffix(".lock"), waiting=meter.wait) as lock:

        def advance(count: int) -> None:
            lock.beat()
            meter.advance(count)

        return source.identity(record, advance)


class _Meter:
    """Turns steps into (done, total) for the caller, never backwards."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._done = 0
        self._total = 0

    def expect(self, remaining_bytes: int) -> None:
        """What is left to do, as far as it is known now."""
        self._total = self._done + remaining_bytes
        self.wait()

    def advance(self, count: int) -> None:
        self._done = min(self._done + count, self._total)
        self.wait()

    def wait(self) -> None:
        self._progress(self._done, self._total)


# --------------------------------------------------------------------------- the shard file


@dataclass(frozen=True)
class _Layout:
    """Where each tensor lies in a rank's file. It follows from the table alone, so that a file can be checked
    by comparing its first bytes with what they have to be."""

    header: bytes
    """The whole beginning of the file, up to the first tensor."""
    offsets: dict[str, tuple[int, tuple[int, ...]]]
    """Name: position in the file, shape."""
    file_bytes: int
    digest: str

    @classmethod
    def of(cls, tensors: list[LocalTensor], dtype: torch.dtype) -> _Layout:
        """A safetensors file whose every tensor begins at a multiple of 64 bytes. The format allows no holes,
        so that what is needed in between is filled by small tensors named "padding"."""
        digest = hashlib.sha256(repr((LAYOUT_VERSION, str(dtype), tensors)).encode()).hexdigest()
        entries: dict[str, Any] = {"__metadata__": {"format": "pt", "phalanx_layout": digest}}
        relative: dict[str, tuple[int, tuple[int, ...]]] = {}
        end = 0
        for tensor in tensors:
            relative[tensor.name] = (end, tensor.shape)
            count = math.prod(tensor.shape) * dtype.itemsize
            entries[tensor.name] = {
                "dtype": _SAFETENSORS_NAMES[dtype],
                "shape": tensor.shape,
                "data_offsets": (end, end + count),
            }
            end += count
            if padding := -end % _ALIGNMENT:
                entries[f"padding.{end}"] = {
                    "dtype": "U8",
                    "shape": (padding,),
                    "data_offsets": (end, end + padding),
                }
                end += padding
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % _ALIGNMENT)
        header = len(text).to_bytes(8, "little") + text
        offsets = {name: (len(header) + start, shape) for name, (start, shape) in relative.items()}
        return cls(header, offsets, len(header) + end, digest)


class _Mapping(mmap.mmap):
    """A mapped shard file. Tensors keep it alive, and with it the mark that its folder is in use."""

    use: FolderUse


def _map(file: Path, layout: _Layout, use: FolderUse) -> _Mapping | None:
    """Maps a rank's file; None if there is none, or it is not what it has to be."""
    try:
        fd = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        if os.fstat(fd).st_size != layout.file_bytes or os.read(fd, len(layout.header)) != layout.header:
            return None
        mapped = _Mapping(fd, layout.file_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
    finally:
        os.close(fd)
    mapped.use = use
    return mapped


def _populate(mapped: _Mapping, meter: _Meter) -> None:
    """Brings the whole file into memory, so that no step of the world waits for the disk."""
    for start in range(0, len(mapped), _CHUNK_BYTES):
        count = min(_CHUNK_BYTES, len(mapped) - start)
        try:
            mapped.madvise(_MADV_POPULATE_READ, start, count)
        except OSError:
            for page in range(start, start + count, mmap.PAGESIZE):
                mapped[page]
        meter.advance(count)


def _views(mapped: _Mapping, layout: _Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    with warnings.catch_warnings():
        # Torch warns that the memory is read-only, which is the point of it.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        for name, (offset, shape) in layout.offsets.items():
            count = math.prod(shape)
            if count:
                flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset)
                tensors[name] = flat.view(shape)
            else:
                tensors[name] = torch.empty(shape, dtype=dtype)
    return tensors


# --------------------------------------------------------------------------- building it


def _build_once(
    file: Path,
    layout: _Layout,
    tensors: list[LocalTensor],
    source: SourceFiles,
    cache: ShardCache,
    use: FolderUse,
    dtype: torch.dtype,
    meter: _Meter,
) -> _Mapping:
    """Builds a rank's file and maps it, or waits for the process that builds it."""
    with locked(file.with_suffix(".lock"), waiting=meter.wait) as lock:
        mapped = _map(file, layout, use)
        if mapped is not None:
            meter.expect(layout.file_bytes)
            return mapped
        file.unlink(missing_ok=True)
        for leftover in file.parent.glob(f"{file.stem}.*.partial"):
            leftover.unlink(missing_ok=True)
        cache.make_room(layout.file_bytes)

        def advance(count: int) -> None:
            lock.beat()
            meter.advance(count)

        _build(file, layout, tensors, source, dtype, advance)
        mapped = _map(file, layout, use)
    if mapped is None:
        raise ModelError(f"{file} was written and cannot be read back; check the disk")
    return mapped


def _build(
    file: Path,
    layout: _Layout,
    tensors: list[LocalTensor],
    source: SourceFiles,
    dtype: torch.dtype,
    advance: Callable[[int], None],
) -> None:
    aside = file.with_name(f"{file.stem}.{os.getpid()}.partial")
    try:
        with contextlib.ExitStack() as stack:
            reader = _SourceReader(source, stack)
            target = stack.enter_context(aside.open("wb", buffering=0))
            target.write(layout.header)
            advance(len(layout.header))
            for tensor in tensors:
                for piece in tensor.slices:
                    for part in reader.read(piece):
                        _write(target, part.to(dtype))
                        advance(part.numel() * dtype.itemsize)
                padding = -target.tell() % _ALIGNMENT
                target.write(bytes(padding))
                advance(padding)
            os.fsync(target.fileno())
        os.replace(aside, file)
        _sync_folder(file.parent)
    except OSError as error:
        raise ModelError(
            f"the shard cache {file.parent} cannot be written: {error.strerror}; "
            "set PHALANX_CACHE to a folder that can be"
        ) from None
    finally:
        aside.unlink(missing_ok=True)


def _write(target: Any, part: Tensor) -> None:
    if not part.numel():
        return
    data = part.contiguous().view(-1).view(torch.uint8).numpy().data
    while data:  # one write call takes 2 GiB at most
        data = data[target.write(data) :]


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _SourceReader:
    """Reads slices out of the model's files, each of which is opened once."""

    def __init__(self, source: SourceFiles, stack: contextlib.ExitStack) -> None:
        self._source = source
        self._stack = stack
        self._open: dict[Path, Any] = {}

    def read(self, piece: SourceSlice) -> Iterator[Tensor]:
        """The slice, in parts of some 32 MiB along axis 0. Raises ModelError that names file and tensor."""
        path = self._source.file_of(piece.name)
        try:
            tensor = self._file(path).get_slice(piece.name)
        except SafetensorError as error:
            raise ModelError(
                f"{path}: tensor {piece.name} is missing; the model is not complete ({error})"
            ) from None
        shape = tuple(tensor.get_shape())
        if shape != piece.shape:
            raise ModelError(
                f"{path}: tensor {piece.name} has shape {list(shape)}, and config.json makes it "
                f"{list(piece.shape)}; the two don't belong together"
            )
        if tensor.get_dtype() not in _SOURCE_DTYPES:
            raise ModelError(
                f"{path}: tensor {piece.name} is {tensor.get_dtype()}; "
                f"supported are {', '.join(_SOURCE_DTYPES)}"
            )
        rows = range(piece.start, piece.stop) if piece.axis == 0 else range(shape[0])
        row_bytes = 4 * math.prod(shape[1:])
        rows_a_part = max(1, _CHUNK_BYTES // max(1, row_bytes))
        for first in range(rows.start, rows.stop, rows_a_part):
            last = min(first + rows_a_part, rows.stop)
            if piece.axis == 0:
                yield tensor[first:last]
            else:
                yield tensor[first:last, piece.start : piece.stop]

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{path} is not a whole safetensors file ({error}); fetch the model again"
                ) from None
        return self._open[path]
