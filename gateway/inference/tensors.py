"""Tensors of the Open Inference Protocol V2: what clients send and get, as JSON numbers or as little-endian bytes.

Used by the models and by both servers, HTTP and gRPC. Nothing here trusts a size: every length is checked before
anything is made of it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gateway.http.errors import ApiError

_CODES = {
    "BOOL": "?",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}
"""Of Python's struct, for each type of numbers."""
BYTES = "BYTES"
DATATYPES = (*_CODES, BYTES)
_FLOATS = ("FP16", "FP32", "FP64")

MAX_DIMENSIONS = 16
_LENGTH = struct.Struct("<I")
_MAX_DEPTH = MAX_DIMENSIONS + 1


@dataclass(frozen=True)
class Tensor:
    """An output: its elements in row-major order; `bytes` for BYTES, else numbers."""

    name: str
    datatype: str
    shape: list[int]
    values: list[Any]


@dataclass(frozen=True)
class GivenTensor:
    """An input as the client sent it, its elements not looked at yet."""

    name: str
    datatype: str
    shape: list[int]
    data: Any = None
    """Of JSON or of typed gRPC contents: flat or nested lists."""
    raw: bytes | None = None
    """Little-endian, in the place of `data`."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def check(self) -> None:
        """Refuses what no model could take. Raises ApiError."""
        if self.datatype not in DATATYPES:
            allowed = ", ".join(DATATYPES)
            raise ApiError(
                400, f"input '{self.name}': datatype is {self.datatype[:20]!r}; allowed: {allowed}"
            )
        if len(self.shape) > MAX_DIMENSIONS or any(not 0 <= size < 2**31 for size in self.shape):
            text = f"shape is {str(self.shape)[:100]}; allowed: up to {MAX_DIMENSIONS} sizes, each 0 or more"
            raise ApiError(400, f"input '{self.name}': {text}")

    def values(self) -> list[Any]:
        """The elements. Raises ApiError for another number of them than the shape says, and for wrong types."""
        self.check()
        try:
            if self.raw is not None:
                return from_raw(self.datatype, self.num_elements, self.raw)
            return _from_lists(self.datatype, self.num_elements, self.data)
        except ValueError as error:
            raise ApiError(400, f"input '{self.name}': {error}") from None


def from_raw(datatype: str, count: int, raw: bytes) -> list[Any]:
    """`count` elements out of their bytes. Raises ValueError if the bytes are more or fewer."""
    if datatype == BYTES:
        return _byte_elements(count, raw)
    code = _CODES[datatype]
    size = struct.calcsize(f"<{code}")
    if len(raw) != count * size:
        text = f"it has {len(raw)} bytes; {count} elements of {datatype} are {count * size} bytes"
        raise ValueError(text)
    return list(struct.unpack(f"<{count}{code}", raw))


def to_raw(datatype: str, values: Sequence[Any]) -> bytes:
    """The bytes of elements; each of BYTES has its length before it, in 4 bytes."""
    if datatype == BYTES:
        return b"".join([part for value in values for part in (_LENGTH.pack(len(value)), value)])
    return struct.pack(f"<{len(values)}{_CODES[datatype]}", *values)


def _byte_elements(count: int, raw: bytes) -> list[bytes]:
    if count * _LENGTH.size > len(raw):  # before anything is done so many times
        raise ValueError(f"it has {len(raw)} bytes; {count} elements have at least {count * _LENGTH.size}")
    values, at = [], 0
    for number in range(count):
        if at + _LENGTH.size > len(raw):
            raise ValueError(f"it ends before the length of element {number}, of {count}")
        (length,) = _LENGTH.unpack_from(raw, at)
        at += _LENGTH.size
        if length > len(raw) - at:
            raise ValueError(f"element {number} has a length of {length} bytes, {len(raw) - at} are left")
        values.append(raw[at : at + length])
        at += length
    if at != len(raw):
        raise ValueError(f"{len(raw) - at} bytes are left behind its {count} elements")
    return values


def _from_lists(datatype: str, count: int, data: Any) -> list[Any]:
    if not isinstance(data, list):
        raise ValueError("its data is not a list")
    values: list[Any] = []
    _flatten(data, values, count, _MAX_DEPTH)
    if len(values) != count:
        raise ValueError(f"it has {len(values)} elements; its shape has {count}")
    return [_element(datatype, value) for value in values]


def _flatten(data: list[Any], into: list[Any], most: int, depth: int) -> None:
    if depth == 0:
        raise ValueError("its data is nested too deeply")
    for part in data:
        if isinstance(part, list):
            _flatten(part, into, most, depth - 1)
        else:
            into.append(part)
        if len(into) > most:
            raise ValueError(f"it has more than the {most} elements of its shape")


def _element(datatype: str, value: Any) -> Any:
    if datatype == BYTES:
        if isinstance(value, bytes):
            return value
        if isinstance(value, str):
            try:
                return value.encode()
            except UnicodeEncodeError:
                raise ValueError("a string is not valid Unicode: it has a lone surrogate") from None
        raise ValueError(f"an element is {_shown(value)}; BYTES takes strings")
    if datatype == "BOOL":
        if isinstance(value, bool):
            return value
        raise ValueError(f"an element is {_shown(value)}; BOOL takes true and false")
    kinds = (int, float) if datatype in _FLOATS else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f"an element is {_shown(value)}, which is no {datatype}")
    try:
        (rounded,) = struct.unpack(f"<{_CODES[datatype]}", struct.pack(f"<{_CODES[datatype]}", value))
    except (struct.error, OverflowError):
        raise ValueError(f"an element is {_shown(value)}, which is out of the range of {datatype}") from None
    return rounded


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return str(value) if abs(value) < 2**64 else "a large number"
    return repr(value)[:40]
