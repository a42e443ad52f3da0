"""The blocks of quantized matrices that the importer leaves beside a model's weights, as they lay in its GGUF file.

Written by the importer, read where shard files are built. Imports no torch. A file in the safetensors format, not
named so: what reads the folder as a model should not take it for weights.
"""

from __future__ import annotations

from pathlib import Path

from engine.models.errors import ModelError
from engine.models.safetensors_header import TensorEntry, read_header
from engine.models.sharding import SourceSlice

BLOCKS_FILE = "gguf_blocks.bin"
BLOCK_TYPES = ("Q4_0", "Q4_1", "Q8_0")
"""Of GGUF: one scale, and offset, for as many inputs as the native kernels have in a group."""
BLOCK_INPUTS = 32


class SourceBlocks:
    """What is there: `[rows, blocks of a row, bytes of a block]` of uint8 by the tensor's name. Raises ModelError for
    a broken file; a folder without one has no blocks."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / BLOCKS_FILE
        self._entries: dict[str, TensorEntry] = read_header(self.path) if self.path.is_file() else {}

    def block_bytes(self, pieces: tuple[SourceSlice, ...]) -> int | None:
        """The size of a block, if all pieces are there in blocks of one size, and none cuts a block in two."""
        sizes = {self._block_bytes(piece) for piece in pieces}
        return sizes.pop() if len(sizes) == 1 else None

    def _block_bytes(self, piece: SourceSlice) -> int | None:
        entry = self._entries.get(piece.name)
        if entry is None or (piece.axis == 1 and (piece.start % BLOCK_INPUTS or piece.stop % BLOCK_INPUTS)):
            return None
        if entry.shape[:2] != (piece.shape[0], piece.shape[1] // BLOCK_INPUTS):
            raise ModelError(
                f"{self.path}: tensor {piece.name} has {list(entry.shape)} blocks, and config.json makes it "
                f"{list(piece.shape)}; remove the folder, and it is imported again"
            )
        return entry.shape[2]


def in_blocks(piece: SourceSlice, block_bytes: int) -> SourceSlice:
    """The same slice of the tensor of blocks."""
    shape = (piece.shape[0], piece.shape[1] // BLOCK_INPUTS, block_bytes)
    if piece.axis == 0:
        return SourceSlice(piece.name, shape, 0, piece.start, piece.stop)
    return SourceSlice(piece.name, shape, 1, piece.start // BLOCK_INPUTS, piece.stop // BLOCK_INPUTS)
