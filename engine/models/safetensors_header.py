"""The beginning of a safetensors file: read to check a file in no time, written so that tensors are aligned.

Called by the loader, the importer and `prepare`. Never touches the tensors' bytes. The format:
https://github.com/huggingface/safetensors (8 bytes of length, a JSON header, the tensors without holes).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.models.errors import ModelError

ELEMENT_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}
"""The dtypes that are read and written here, and the bytes of an element."""

_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file."""

    name: str
    dtype: str
    """As the format names it: F32, BF16, F16, ..."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True)
class Layout:
    """Where everything lies in a file that is to be written."""

    header: bytes
    """All that comes before the first tensor."""
    offsets: dict[str, int]
    """The position of each tensor in the file, in the order of the file."""
    file_bytes: int


def lay_out(entries: Iterable[TensorEntry], metadata: dict[str, str], alignment: int = 1) -> Layout:
    """The layout of a file whose tensors begin at multiples of `alignment` bytes.

    The format allows no holes: what is needed in between is filled by small tensors named "padding.*".
    """
    names: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    starts: dict[str, int] = {}
    end = 0
    for entry in entries:
        starts[entry.name] = end
        names[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": (end, end + entry.num_bytes),
        }
        end += entry.num_bytes
        if padding := -end % alignment:
            offsets = (end, end + padding)
            names[f"padding.{end}"] = {"dtype": "U8", "shape": (padding,), "data_offsets": offsets}
            end += padding
    text = json.dumps(names, separators=(",", ":")).encode()
    # 64 in any case: readers that map a file like it, and it costs nothing.
    text += b" " * (-(len(text) + 8) % 64)
    header = len(text).to_bytes(8, "little") + text
    return Layout(header, {name: len(header) + start for name, start in starts.items()}, len(header) + end)


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors that a file holds, once it is clear that the file is whole.

    Raises ModelError that names the file if it is no safetensors file, or shorter than its header says.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            size = file.stat().st_size
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ModelError(f"{file} is not a whole safetensors file; fetch the model again")
            header = json.loads(opened.read(length))
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ModelError(f"{file} is not a safetensors file; fetch the model again") from None
    entries: dict[str, TensorEntry] = {}
    end = 0
    try:
        for name, value in header.items():
            if name != "__metadata__":
                entry = TensorEntry(name, str(value["dtype"]), tuple(map(int, value["shape"])))
                begins, ends = map(int, value["data_offsets"])
                if not 0 <= begins <= ends or (
                    entry.dtype in ELEMENT_BYTES and ends - begins != entry.num_bytes
                ):
                    raise ModelError(
                        f"{file}: tensor {name} of type {entry.dtype} and shape {list(entry.shape)} cannot lie at "
                        f"bytes {begins} to {ends}; fetch the model again"
                    )
                entries[name] = entry
                end = max(end, ends)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        raise ModelError(f"{file} has a broken safetensors header; fetch the model again") from None
    if size != 8 + length + end:
        raise ModelError(
            f"{file} is truncated or damaged: its header says {8 + length + end} bytes and it has {size}; "
            "fetch the model again"
        )
    return entries
