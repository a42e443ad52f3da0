"""Weights as whole numbers of 8 or 4 bits, as the native kernels read them (`native/quantized.h` has the same words).

Called where shard files are built and in tests. Rounds to the nearest value of each group: there is no calibration.
What a GGUF file has rounded already comes by `ggml_blocks`.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

PANEL = 16
GROUP_INPUTS = 32
_SCALE_BYTES = 64
"""Of a group of a panel: 16 float32 scales, or 16 float16 scales and as many offsets."""


class Quantization(StrEnum):
    """What a rank's matrices are kept in."""

    NONE = "none"
    INT8 = "int8"
    INT4 = "int4"

    def of(self, name: str) -> Quantization:
        """For one tensor, by its local name. Embedding and head have 8 bits where the others have 4: few more
        bytes, and most of the loss is saved. A router is small, and what it says decides."""
        if name.endswith("router.weight"):
            return Quantization.NONE
        is_edge = name.split(".")[0] in ("embed", "head")
        return Quantization.INT8 if self is Quantization.INT4 and is_edge else self


_GROUP_BYTES = {
    Quantization.INT8: _SCALE_BYTES + PANEL * GROUP_INPUTS,
    Quantization.INT4: _SCALE_BYTES + PANEL * GROUP_INPUTS // 2,
}
_BY_GROUP_BYTES = {size: quantization for quantization, size in _GROUP_BYTES.items()}


def quantized_shape(shape: tuple[int, ...], quantization: Quantization) -> tuple[int, ...]:
    """Of uint8, for weights `[num_outputs, num_inputs]`: `[panels, groups, bytes of a group]`."""
    num_outputs, num_inputs = shape
    return (-(-num_outputs // PANEL), -(-num_inputs // GROUP_INPUTS), _GROUP_BYTES[quantization])


def quantization_of(packed: Tensor) -> Quantization:
    """What `quantize` made it with."""
    return _BY_GROUP_BYTES[packed.shape[-1]] if packed.dtype == torch.uint8 else Quantization.NONE


def quantize(rows: Tensor, quantization: Quantization) -> Tensor:
    """`[num_outputs, num_inputs]` to uint8 of `quantized_shape`; what is missing to whole panels and groups is
    zero."""
    num_outputs, num_inputs = rows.shape
    padded = torch.nn.functional.pad(rows.float(), (0, -num_inputs % GROUP_INPUTS, 0, -num_outputs % PANEL))
    groups = padded.view(-1, PANEL, padded.shape[1] // GROUP_INPUTS, GROUP_INPUTS).transpose(1, 2)
    return _in_eight_bits(groups) if quantization is Quantization.INT8 else _in_four_bits(groups)


def dequantize(packed: Tensor, num_outputs: int, num_inputs: int) -> Tensor:
    """The float32 values that quantized weights stand for: `[num_outputs, num_inputs]`."""
    panels, groups, _ = packed.shape
    head, body = packed[..., :_SCALE_BYTES].contiguous(), packed[..., _SCALE_BYTES:]
    if quantization_of(packed) is Quantization.INT8:
        scales = head.view(torch.float32)
        offsets = -128 * scales
        parts = body.reshape(panels, groups, GROUP_INPUTS // 4, PANEL, 4)
    else:
        scales, offsets = head.view(torch.float16).float().view(panels, groups, 2, PANEL).unbind(2)
        lines = body.reshape(panels, groups, GROUP_INPUTS // 8, PANEL, 4)
        parts = torch.stack((lines & 15, lines >> 4), dim=3).reshape(panels, groups, -1, PANEL, 4)
    numbers = parts.transpose(2, 3).reshape(panels, groups, PANEL, GROUP_INPUTS).float()
    values = numbers * scales.unsqueeze(-1) + offsets.unsqueeze(-1)
    return values.transpose(1, 2).reshape(panels * PANEL, -1)[:num_outputs, :num_inputs]


def packed_groups(numbers: Tensor, scales: Tensor, offsets: Tensor | None) -> Tensor:
    """Numbers `[panels, groups, 16, 32]` of uint8 as the kernels read them. They stand for `scales * (number - 128)`
    without offsets, and are of 8 bits then; else for `scales * number + offsets`, of 4 bits. Scales `[panels, groups,
    16]`: float32, with offsets float16 as those are."""
    parts = _parts(numbers)
    if offsets is None:
        return torch.cat((_bytes(scales), parts.flatten(2)), dim=-1).contiguous()
    pairs = parts[:, :, ::2] | parts[:, :, 1::2] << 4
    return torch.cat((_bytes(torch.cat((scales, offsets), dim=-1)), pairs.flatten(2)), dim=-1).contiguous()


def _in_eight_bits(groups: Tensor) -> Tensor:
    """Values `[panels, groups, 16, 32]`, rounded to 255 steps around zero."""
    scales = groups.abs().amax(-1) / 127
    numbers = (groups / scales.clamp(min=1e-30).unsqueeze(-1)).round().clamp(-127, 127) + 128
    return packed_groups(numbers.to(torch.uint8), scales, None)


def _in_four_bits(groups: Tensor) -> Tensor:
    """The same with 16 values between the least and the greatest; zero is always among them or between two."""
    least, greatest = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((greatest - least) / 15).half()
    offsets = least.half()
    steps = scales.float().clamp(min=1e-30).unsqueeze(-1)
    numbers = ((groups - offsets.float().unsqueeze(-1)) / steps).round().clamp(0, 15)
    return packed_groups(numbers.to(torch.uint8), scales, offsets)


def _parts(numbers: Tensor) -> Tensor:
    """`[panels, groups, 16, 32]` to `[panels, groups, 8, 16 * 4]`: four inputs of all outputs lie together."""
    panels, groups = numbers.shape[:2]
    parts = numbers.view(panels, groups, PANEL, GROUP_INPUTS // 4, 4).transpose(2, 3)
    return parts.reshape(panels, groups, GROUP_INPUTS // 4, 4 * PANEL)


def _bytes(scales: Tensor) -> Tensor:
    return scales.contiguous().view(torch.uint8).view(*scales.shape[:2], _SCALE_BYTES)
