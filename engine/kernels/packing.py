"""How weights lie for the kernels: panels of 16 outputs, so that one vector holds the same input of 16 outputs.

Called where shard files are built and in tests. `native/kernels.h` has the same words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.ggml_blocks import pack_blocks
from engine.kernels.quantization import Quantization, quantize

PANEL = 16
"""Outputs of a panel, and tokens of a block of the KV cache."""


def packed_shape(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """The shape of packed weights `[num_outputs, num_inputs]`: `[panels, num_inputs / step, 16 * step]`, where
    step is 2 for bfloat16 (pairs of inputs lie together) and 1 for float32."""
    num_outputs, num_inputs = shape
    step = _step(dtype)
    return (-(-num_outputs // PANEL), -(-num_inputs // step), PANEL * step)


def pack(rows: Tensor) -> Tensor:
    """Packs `[num_outputs, num_inputs]`; what is missing to whole panels and steps is zero."""
    num_outputs, num_inputs = rows.shape
    step = _step(rows.dtype)
    rows = torch.nn.functional.pad(rows, (0, -num_inputs % step, 0, -num_outputs % PANEL))
    panels = rows.view(rows.shape[0] // PANEL, PANEL, rows.shape[1] // step, step)
    shape = packed_shape((num_outputs, num_inputs), rows.dtype)
    return panels.permute(0, 2, 1, 3).contiguous().view(shape)


def padded(size: int) -> int:
    """Elements that the KV cache holds for a head of `size`."""
    return -(-size // PANEL) * PANEL


class Packer:
    """Packs a tensor that comes in parts of any number of rows: all of them values, or all blocks of a GGUF file."""

    def __init__(self, quantization: Quantization = Quantization.NONE) -> None:
        self._quantization = quantization
        self._rest: Tensor | None = None

    def add(self, rows: Tensor) -> Tensor:
        """The panels that are complete with these rows."""
        if self._rest is not None:
            rows = torch.cat((self._rest, rows))
        whole = rows.shape[0] // PANEL * PANEL
        self._rest = rows[whole:].clone()
        return self._pack(rows[:whole])

    def finish(self) -> Tensor:
        """The last panel, padded; nothing if all are complete."""
        assert self._rest is not None
        return self._pack(self._rest)

    def _pack(self, rows: Tensor) -> Tensor:
        if self._quantization is Quantization.NONE:
            return pack(rows)
        if rows.dtype == torch.uint8:
            return pack_blocks(rows, self._quantization)
        return quantize(rows, self._quantization)


def _step(dtype: torch.dtype) -> int:
    return {torch.float32: 1, torch.bfloat16: 2}[dtype]
