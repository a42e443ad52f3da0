"""Reading of GGUF files: their metadata with types checked, their tensors as float32 rows or as they lie.

Called by the importer. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package
does the reading; what it raises on a broken file becomes a ModelError here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.models.errors import ModelError

_ROWS_AT_ONCE_ELEMENTS = 2**22
_LONGEST_LIST = 2**22
"""Entries of a list in the metadata; the longest ones are merges, of which large vocabularies have half a million."""


class GgufFile:
    """One GGUF file. Raises ModelError if it is none, is truncated, or is one part of several."""

    def __init__(self, path: Path) -> None:

        self.path = path
        try:
            with path.open("rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}") from None
        if magic != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file; fetch the model again")
        try:
            self._reader = _reader_class()(path)
        except ModelError:
            raise
        except Exception as error:
            # The package checks nothing: a file that ends early shows as whatever numpy says of it.
            raise ModelError(f"{path} is truncated or damaged ({error}); fetch the model again") from None
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in self._reader.tensors}
        size = path.stat().st_size
        for tensor in self.tensors.values():
            if tensor.data_offset + tensor.n_bytes > size:
                raise ModelError(
                    f"{path} is truncated: tensor {tensor.name} ends beyond the file; fetch the model again"
                )
        if self.get("split.count", int, 1) > 1:
            raise ModelError(f"{path} is one part of several, which are not supported; merge them first")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A metadata value. Raises ModelError if it is missing without a default, or of another type."""
        field = self._reader.fields.get(key)
        if field is None:
            if default is None:
                raise ModelError(f"{self.path}: metadata {key} is missing")
            return default
        value = field.contents()
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ModelError(
                f"{self.path}: metadata {key} is {value!r:.80}; it has to be of type {kind.__name__}"
            )
        return value

    def strings(self, key: str) -> list[str]:
        """A metadata list of strings, which may be long."""
        field = self._reader.fields.get(key)
        if field is None:
            raise ModelError(f"{self.path}: metadata {key} is missing")
        try:
            return [bytes(field.parts[index]).decode("utf-8") for index in field.data]
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path}: metadata {key} is not UTF-8: {error}") from None

    def numbers(self, key: str) -> list[int]:
        """A metadata list of whole numbers, or a single one as such a list; empty if there is none."""
        field = self._reader.fields.get(key)
        return [] if field is None else [int(field.parts[index][0]) for index in field.data]

    def scores(self, key: str) -> list[float]:
        """A metadata list of numbers, which may be long; empty if there is none."""
        field = self._reader.fields.get(key)
        return [] if field is None else [float(field.parts[index][0]) for index in field.data]

    def size(self, key: str, default: int | None = None, at_most: int = 2**22) -> int:
        """A metadata value that counts something. Raises ModelError as `get` does, and for one below 1, or so large
        that no model has it: a damaged file must not keep anybody busy for hours."""
        value: int = self.get(key, int, default)
        if not 1 <= value <= at_most:
            raise ModelError(f"{self.path}: metadata {key} is {value}; it has to lie between 1 and {at_most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A metadata value as the number that was meant: a file holds float32, whose shortest decimal form is 1e-05
        and not 9.99999975e-06."""
        if default is not None and not self.has(key):
            return default
        value: float = self.get(key, float)
        return float(str(np.float32(value)))

    def floats(self, tensor: str) -> list[float]:
        """A small tensor of factors, each as the number that was meant."""
        return [float(str(value)) for part in self.rows(tensor) for value in part.ravel()]

    def has(self, key: str) -> bool:
        return key in self._reader.fields

    def length(self, key: str) -> int:
        """Entries of a metadata list; 0 if there is none."""
        field = self._reader.fields.get(key)
        return 0 if field is None else len(field.data)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape as everybody but GGUF writes it: rows first."""
        return tuple(int(size) for size in reversed(self.tensors[tensor].shape))

    def type_name(self, tensor: str) -> str:
        """What its numbers are kept in: F32, Q4_1, ..."""
        return str(self.tensors[tensor].tensor_type.name)

    def row_bytes(self, tensor: str) -> int:
        """What a row of it takes in the file, if it is quantized."""
        return int(self.tensors[tensor].data.shape[-1])

    def check_type(self, name: str) -> None:
        """Raises ModelError if a tensor is of a type that cannot be read, without reading it."""
        import gguf

        kind = self.tensors[name].tensor_type
        block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
        if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            return
        try:
            gguf.quants.dequantize(np.zeros((1, block_bytes), dtype=np.uint8), kind)
        except NotImplementedError:
            raise ModelError(
                f"{self.path}: tensor {name} is of type {kind.name}, which cannot be read; "
                "take another quantization of the model"
            ) from None

    def rows(
        self, name: str, row_order: NDArray[np.intp] | None = None, expert: int | None = None
    ) -> Iterator[NDArray[np.float32]]:
        """A tensor as float32, some 16 MiB of rows at a time, in another order of the rows if wanted, and of a
        tensor that holds several one after another only the one that `expert` says.

        Rows are reordered while they are quantized still, which is exact: no block spans two of them. Raises
        ModelError for a type that cannot be read.
        """
        from gguf.quants import dequantize

        self.check_type(name)
        for part in self.stored_rows(name, row_order, expert):
            yield np.asarray(dequantize(part, self.tensors[name].tensor_type), dtype=np.float32)

    def stored_rows(
        self, name: str, row_order: NDArray[np.intp] | None = None, expert: int | None = None
    ) -> Iterator[NDArray[Any]]:
        """The same rows as they lie in the file: the bytes of their blocks, or floats."""
        tensor = self.tensors[name]
        data = tensor.data if expert is None else tensor.data[expert]
        if row_order is not None:
            data = data[row_order]
        if len(self.shape(name)) == 1:
            data = data.reshape(1, -1)
        step = max(1, _ROWS_AT_ONCE_ELEMENTS // self.shape(name)[-1])
        for start in range(0, len(data), step):
            yield data[start : start + step]


def _reader_class() -> Any:
    """The package's reader, which reads nothing from behind the end of a file, where it might go on for hours, and
    says of a type that it does not know in which tensor it stands."""
    import gguf

    class Reader(gguf.GGUFReader):
        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            for field in fields:
                _length, name, _num_dims, _dims, kind, _offset = field.parts
                if int(kind[0]) not in gguf.GGMLQuantizationType._value2member_map_:
                    raise ModelError(
                        f"{self.path}: tensor {bytes(name).decode(errors='replace')} is of type {int(kind[0])}, "
                        "which is not known; the file is damaged, or newer than the gguf package here"
                    )
            super()._build_tensors(start_offs, fields)

        def __init__(self, path: Path) -> None:
            self.path = path
            super().__init__(path)

        def _get(
            self,
            offset: int,
            dtype: Any,
            count: int = 1,
            override_order: Literal["I", "S", "<"] | None = None,
        ) -> Any:
            # Python's numbers: those of numpy would overflow where a damaged file claims to hold a lot.
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends in the midst of something")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == gguf.GGUFValueType.ARRAY:
                count = int(self._get(orig_offs + 4, np.uint64)[0])
                if count > _LONGEST_LIST:
                    raise ValueError(f"a list of {count} entries")
            return super()._get_field_parts(orig_offs, raw_type)

    return Reader


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounds float32 to the nearest bfloat16, ties to even; the result holds the bits."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    rounded >>= np.uint32(16)
    result = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        result[nan] = 0x7FC0  # rounding up could turn the bits of a NaN into an infinity
    return result
