"""Blocks of GGUF files in the words of the native kernels, with no value changed on the way.

Called where shard files are built and in tests. Formats: block_q8_0, block_q4_0 and block_q4_1 of ggml
(https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h): 32 inputs of one output, as here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.quantization import GROUP_INPUTS, PANEL, Quantization, packed_groups, quantized_shape

_Q4_0_BYTES, _Q4_1_BYTES, _Q8_0_BYTES = 18, 20, 34
"""Of a block: a block says what it is by its size."""

_HELD_BY = {
    # Eight bits have a scale and no offset, like Q8_0 and Q4_0; an offset of Q4_1 is any number.
    Quantization.INT8: (_Q8_0_BYTES, _Q4_0_BYTES),
    Quantization.INT4: (_Q4_0_BYTES, _Q4_1_BYTES),
    Quantization.NONE: (),
}


def holds(quantization: Quantization, block_bytes: int) -> bool:
    """Whether weights kept so can have exactly the values of blocks of that size."""
    return block_bytes in _HELD_BY[quantization]


def pack_blocks(blocks: Tensor, quantization: Quantization) -> Tensor:
    """Blocks, uint8 `[num_outputs, num_inputs / 32, bytes of a block]`, as `quantize` would lay out their values;
    the last panel is filled with zeros. `holds` says what is possible."""
    num_outputs, num_groups, block_bytes = blocks.shape
    if not num_outputs:
        return blocks.new_empty(quantized_shape((0, num_groups * GROUP_INPUTS), quantization))
    filled = torch.nn.functional.pad(blocks, (0, 0, 0, 0, 0, -num_outputs % PANEL))
    groups = filled.view(-1, PANEL, num_groups, block_bytes).transpose(1, 2)
    scales = _halves(groups[..., 0:2])
    if block_bytes == _Q8_0_BYTES:
        # Signed numbers; the kernels' begin at -128.
        return packed_groups(groups[..., 2:] ^ 128, scales.float(), None)
    numbers = _nibbles(groups[..., block_bytes - GROUP_INPUTS // 2 :])
    if quantization is Quantization.INT8:
        return packed_groups(numbers + 120, scales.float(), None)
    # Four bits without an offset stand for -8 to 7, and the product with a power of two is exact.
    offsets = _halves(groups[..., 2:4]) if block_bytes == _Q4_1_BYTES else -8 * scales
    return packed_groups(numbers, scales, offsets)


def _halves(two_bytes: Tensor) -> Tensor:
    return two_bytes.contiguous().view(torch.float16).squeeze(-1)


def _nibbles(body: Tensor) -> Tensor:
    """The low halves of all bytes are the first 16 numbers, the high ones the last."""
    return torch.cat((body & 15, body >> 4), dim=-1)
