"""The file that holds the cut weights of one rank: written once, then mapped and never copied.

Called by `weights`. What goes in is the table of `sharding`; building one never holds more than a part of a
tensor in memory of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import mmap
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.kernels.ggml_blocks import holds
from engine.kernels.packing import Packer, packed_shape
from engine.kernels.quantization import Quantization, quantized_shape
from engine.models.errors import ModelError
from engine.models.safetensors_header import Layout, TensorEntry, lay_out, read_header
from engine.models.shard_cache import FolderUse
from engine.models.sharding import LocalTensor, SourceSlice
from engine.models.source_blocks import in_blocks
from engine.models.source_files import SourceFiles, check_tensor

LAYOUT_VERSION = 3
"""To be raised whenever the bytes of a shard file change for the same source and shape."""

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}
"""What weights are kept in, and what the safetensors format calls it; U8: quantized."""

Advance = Callable[[int], None]
"""Is told the bytes that were done since the last call."""

_ALIGNMENT = 64
_CHUNK_BYTES = 32 * 2**20
_MADV_POPULATE_READ = 22  # Linux 5.14; Python 3.11 has no name for it


class MappedShard(mmap.mmap):
    """A mapped shard file. Tensors keep it alive, and with it the mark that its folder is in use."""

    use: FolderUse


@dataclass(frozen=True)
class ShardFile:
    """What a rank's file has to be. It follows from the table alone, so that a file is checked by comparing
    its first bytes with what they have to be, and its size."""

    tensors: tuple[LocalTensor, ...]
    dtype: torch.dtype
    packed: bool
    """Matrices lie in the panels that the native kernels read."""
    quantization: Quantization
    """Of the matrices; needs `packed`."""
    digest: str
    """Identifies table, dtype, packing and layout version."""
    layout: Layout

    @classmethod
    def of(
        cls,
        tensors: list[LocalTensor],
        dtype: torch.dtype,
        packed: bool = False,
        quantization: Quantization = Quantization.NONE,
    ) -> ShardFile:
        name = DTYPE_NAMES[dtype]
        identity: tuple[object, ...] = (LAYOUT_VERSION, name, packed, tensors)
        if quantization is not Quantization.NONE:
            identity += (quantization.value,)
        digest = hashlib.sha256(repr(identity).encode()).hexdigest()
        kept = {tensor.name: _Kept.of(tensor, dtype, packed, quantization) for tensor in tensors}
        entries = [TensorEntry(name, DTYPE_NAMES[form.dtype], form.shape) for name, form in kept.items()]
        layout = lay_out(entries, {"phalanx_layout": digest}, _ALIGNMENT)
        return cls(tuple(tensors), dtype, packed, quantization, digest, layout)

    @property
    def num_bytes(self) -> int:
        return self.layout.file_bytes

    def map(self, path: Path, use: FolderUse) -> MappedShard | None:
        """Maps a file read-only; None if there is none, or it is not what it has to be."""
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            header = self.layout.header
            status = os.fstat(fd)
            if status.st_size != self.num_bytes or os.read(fd, len(header)) != header:
                return None
            with contextlib.suppress(OSError):
                os.utime(
                    fd, ns=(time.time_ns(), status.st_mtime_ns)
                )  # also where the disk keeps no last access
                # mmap duplicates the descriptor, and the lock stays as long as the mapping: the file is not stale.
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            mapped = MappedShard(fd, self.num_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(fd)
        mapped.use = use
        return mapped

    def views(self, mapped: MappedShard) -> dict[str, Tensor]:
        """The tensors of a mapped file, none of them copied."""
        tensors: dict[str, Tensor] = {}
        with warnings.catch_warnings():
            # Torch warns that the memory is read-only, which is the point of it.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            for tensor in self.tensors:
                kept = _Kept.of(tensor, self.dtype, self.packed, self.quantization)
                count, offset = math.prod(kept.shape), self.layout.offsets[tensor.name]
                if count:
                    flat = torch.frombuffer(mapped, dtype=kept.dtype, count=count, offset=offset)
                    tensors[tensor.name] = flat.view(kept.shape)
                else:
                    tensors[tensor.name] = torch.empty(kept.shape, dtype=kept.dtype)
        return tensors

    def build(self, path: Path, source: SourceFiles, advance: Advance) -> None:
        """Writes the file: aside, synced, renamed. The caller holds the lock that keeps others from it.

        Raises ModelError that names the source file and the tensor, or the cache if it cannot be written.
        """
        for leftover in path.parent.glob(f"{path.stem}.*.partial"):
            leftover.unlink(missing_ok=True)  # of a process that was killed while it built
        aside = path.with_name(f"{path.stem}.{os.getpid()}.partial")
        try:
            with contextlib.ExitStack() as stack:
                reader = _SourceReader(source, stack)
                target = stack.enter_context(aside.open("wb", buffering=0))
                target.write(self.layout.header)
                advance(len(self.layout.header))
                for tensor in self.tensors:
                    if self.packed and _is_matrix(tensor):
                        for rows in self._matrices(tensor, reader):
                            packer = Packer(self.quantization.of(tensor.name))
                            for part in rows:
                                _write(target, packer.add(part))
                                advance(part.shape[0] * tensor.shape[1] * self.dtype.itemsize)
                            _write(target, packer.finish())
                    else:
                        for piece in tensor.slices:
                            for part in reader.read(piece):
                                _write(target, part.to(self.dtype))
                                advance(part.numel() * self.dtype.itemsize)
                    padding = -target.tell() % _ALIGNMENT
                    target.write(bytes(padding))
                    advance(padding)
                os.fsync(target.fileno())
            os.replace(aside, path)
            _sync_folder(path.parent)
        except OSError as error:
            raise ModelError(
                f"the shard cache {path.parent} cannot be written: {error.strerror}; "
                "set PHALANX_CACHE to a folder that can be"
            ) from None
        finally:
            aside.unlink(missing_ok=True)

    def _matrices(self, tensor: LocalTensor, reader: _SourceReader) -> Iterator[Iterator[Tensor]]:
        """The rows of each of the tensor's matrices as a Packer takes them: values, or blocks of the source that
        stand for the same ones."""
        quantization = self.quantization.of(tensor.name)
        block_bytes = reader.source.blocks.block_bytes(tensor.slices)
        if block_bytes is not None and not holds(quantization, block_bytes):
            block_bytes = None
        # What is to be quantized is rounded once.
        dtype = self.dtype if quantization is Quantization.NONE else torch.float32
        count = len(tensor.slices) // tensor.experts
        for first in range(0, len(tensor.slices), count):
            yield reader.rows(tensor.slices[first : first + count], dtype, block_bytes)


def _is_matrix(tensor: LocalTensor) -> bool:
    return len(tensor.shape) == 2


@dataclass(frozen=True)
class _Kept:
    """What a tensor is in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: LocalTensor, dtype: torch.dtype, packed: bool, quantization: Quantization) -> _Kept:
        if not (packed and _is_matrix(tensor)):
            return cls(tensor.shape, dtype)
        own = quantization.of(tensor.name)
        # Each begins with a panel of its own.
        one = (tensor.shape[0] // tensor.experts, tensor.shape[1])
        shape = packed_shape(one, dtype) if own is Quantization.NONE else quantized_shape(one, own)
        kept = dtype if own is Quantization.NONE else torch.uint8
        return cls((tensor.experts * shape[0], *shape[1:]), kept)


def populate(mapped: MappedShard, advance: Advance) -> None:
    """Brings the whole file into memory, so that no step of the world waits for the disk."""
    for part in _parts(range(len(mapped)), _CHUNK_BYTES):
        try:
            mapped.madvise(_MADV_POPULATE_READ, part.start, len(part))
        except OSError:
            for page in part[:: mmap.PAGESIZE]:
                mapped[page]
        advance(len(part))


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
    """Reads slices out of the model's files, each of which is checked and opened once."""

    def __init__(self, source: SourceFiles, stack: contextlib.ExitStack) -> None:
        self.source = source
        self._stack = stack
        self._files: dict[Path, tuple[dict[str, TensorEntry], Any]] = {}

    def read(self, piece: SourceSlice) -> Iterator[Tensor]:
        """The slice, in parts of some 32 MiB along axis 0. Raises ModelError that names file and tensor."""
        path = self.source.file_of(piece.name)
        entries, opened = self._open(path)
        check_tensor(path, entries.get(piece.name), piece)
        yield from self._read(opened, piece)

    def rows(
        self, pieces: tuple[SourceSlice, ...], dtype: torch.dtype, block_bytes: int | None
    ) -> Iterator[Tensor]:
        """Slices one after the other: values of `dtype`, or with `block_bytes` their blocks."""
        for piece in pieces:
            if block_bytes is None:
                for part in self.read(piece):
                    yield part.to(dtype)
            else:
                opened = self._open(self.source.blocks.path)[1]
                yield from self._read(opened, in_blocks(piece, block_bytes))

    def _read(self, opened: Any, piece: SourceSlice) -> Iterator[Tensor]:
        tensor = opened.get_slice(piece.name)
        rows = range(piece.start, piece.stop) if piece.axis == 0 else range(piece.shape[0])
        row_bytes = 4 * math.prod(piece.shape[1:])
        for part in _parts(rows, max(1, _CHUNK_BYTES // row_bytes)):
            if piece.axis == 0:
                yield tensor[part.start : part.stop]
            else:
                yield tensor[part.start : part.stop, piece.start : piece.stop]

    def _open(self, path: Path) -> tuple[dict[str, TensorEntry], Any]:
        if path not in self._files:
            entries = read_header(path)
            try:
                opened = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be opened ({error}); fetch the model again") from None
            self._files[path] = (entries, opened)
        return self._files[path]


def _parts(rows: range, size: int) -> Iterator[range]:
    for start in range(rows.start, rows.stop, size):
        yield range(start, min(start + size, rows.stop))
