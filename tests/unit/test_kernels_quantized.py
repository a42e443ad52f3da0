"""Weights of 8 and 4 bits: what rounding costs, and native linears against plain arithmetic on the same numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.bindings import linear_struct, open_kernels
from engine.kernels.packing import Packer
from engine.kernels.quantization import (
    GROUP_INPUTS,
    Quantization,
    dequantize,
    quantization_of,
    quantize,
    quantized_shape,
)
from tests.native_kernels import every_instruction_set

KERNELS = {
    (name, threads): open_kernels(threads, name) for name in every_instruction_set() for threads in (1, 3)
}
BOTH = pytest.mark.parametrize("quantization", [Quantization.INT8, Quantization.INT4])
every_path = pytest.mark.parametrize(
    "path", [(name, 1) for name in every_instruction_set()], ids=lambda p: p[0]
)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Rows as the kernels round them: 8 bits for each group of 32."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP_INPUTS)).double()
    groups = padded.view(x.shape[0], -1, GROUP_INPUTS)
    scales = groups.abs().amax(-1, keepdim=True) / 127
    return (torch.round(groups / scales.clamp(min=1e-300)) * scales).view(x.shape[0], -1)[:, : x.shape[1]]


def in_the_middle(x: torch.Tensor) -> torch.Tensor:
    """A whole step where an input lies so near to the middle of two numbers that float32 decides; else 0."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP_INPUTS)).double()
    groups = padded.view(x.shape[0], -1, GROUP_INPUTS)
    steps = groups.abs().amax(-1, keepdim=True).clamp(min=1e-300) / 127
    is_near = ((groups / steps) % 1 - 0.5).abs() < 1e-4
    return (is_near * steps).view(x.shape[0], -1)[:, : x.shape[1]]


@BOTH
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.integers(1, 150), st.integers(0, 2**32))
def test_values_are_the_nearest_of_their_group(
    quantization: Quantization, num_outputs: int, num_inputs: int, seed: int
) -> None:
    weights = torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(seed))
    packed = quantize(weights, quantization)
    assert packed.shape == quantized_shape((num_outputs, num_inputs), quantization)
    assert quantization_of(packed) is quantization
    values = dequantize(packed, num_outputs, num_inputs)
    padded = torch.nn.functional.pad(weights, (0, -num_inputs % GROUP_INPUTS))
    groups = padded.view(num_outputs, -1, GROUP_INPUTS)
    if quantization is Quantization.INT8:
        step = groups.abs().amax(-1) / 127
    else:  # the scale and the offset are kept in float16
        step = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / 15 * 1.02 + 0.01
    allowed = step.repeat_interleave(GROUP_INPUTS, 1)[:, :num_inputs] * 0.5001 + 1e-6
    assert ((values - weights).abs() <= allowed).all()


@BOTH
def test_what_has_been_rounded_stays(quantization: Quantization) -> None:
    weights = torch.randn(48, 96)
    values = dequantize(quantize(weights, quantization), 48, 96)
    again = dequantize(quantize(values, quantization), 48, 96)
    assert torch.allclose(values, again, rtol=2e-3, atol=1e-3)
    assert not quantize(torch.zeros(3, 5), quantization)[..., :64].any()
    assert not dequantize(quantize(torch.zeros(3, 5), quantization), 3, 5).any()


@every_path
@BOTH
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 150), st.integers(1, 200), st.booleans(), st.integers(0, 2**32))
def test_linear_is_that_of_the_values(
    path: tuple[str, int],
    quantization: Quantization,
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    has_bias: bool,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_inputs, generator=random)
    packed = quantize(torch.randn(num_outputs, num_inputs, generator=random), quantization)
    values = dequantize(packed, num_outputs, num_inputs).double()
    bias = torch.randn(num_outputs, generator=random) if has_bias else None
    found = KERNELS[path].linear(linear_struct(packed, num_outputs, num_inputs, bias), x)
    expected = rounded(x) @ values.T + (0 if bias is None else bias)
    # What lies in the middle between two numbers may fall either way in float32; the sums are of float32.
    allowed = 1e-4 * (x.double().abs() @ values.abs().T) + 1e-4 + in_the_middle(x) @ values.abs().T
    assert ((found - expected).abs() <= allowed).all()


@every_path
@BOTH
def test_rows_keep_their_bits_whatever_is_beside_them(
    path: tuple[str, int], quantization: Quantization
) -> None:
    x, packed = torch.randn(300, 200), quantize(torch.randn(150, 200), quantization)
    struct = linear_struct(packed, 150, 200)
    whole = KERNELS[path].linear(struct, x)
    for num_rows in [*range(1, 30), 241]:
        begin = (37 * num_rows) % (300 - num_rows)
        part = KERNELS[path].linear(struct, x[begin : begin + num_rows].contiguous())
        assert torch.equal(part, whole[begin : begin + num_rows]), f"{num_rows} rows"
    assert torch.equal(KERNELS[path[0], 3].linear(struct, x), whole), "three threads"


@BOTH
def test_every_instruction_set_gives_the_same_bits(quantization: Quantization) -> None:
    x, packed = torch.randn(20, 200), quantize(torch.randn(150, 200), quantization)
    struct = linear_struct(packed, 150, 200)
    found = {name: kernels.linear(struct, x) for (name, threads), kernels in KERNELS.items() if threads == 1}
    fused = [out for name, out in found.items() if name != "portable"]
    assert all(torch.equal(out, fused[0]) for out in fused)


@every_path
@BOTH
def test_embedding_rows_are_the_values(path: tuple[str, int], quantization: Quantization) -> None:
    packed = quantize(torch.randn(70, 45), quantization)
    found = KERNELS[path].embed(linear_struct(packed, 70, 45), torch.tensor([3, 69, 70, 0, -1]), 0, 2.0)
    values = dequantize(packed, 70, 45)
    expected = torch.stack([values[3], values[69], torch.zeros(45), values[0], torch.zeros(45)]) * 2
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


@BOTH
def test_parts_of_any_size_pack_to_the_same(quantization: Quantization) -> None:
    weights = torch.randn(100, 70)
    packer = Packer(quantization)
    parts = [packer.add(part) for part in weights.split([1, 30, 2, 50, 17])]
    assert torch.equal(torch.cat([*parts, packer.finish()]), quantize(weights, quantization))


def test_embedding_and_head_keep_eight_bits() -> None:
    assert Quantization.INT4.of("embed.weight") is Quantization.INT8
    assert Quantization.INT4.of("head.weight") is Quantization.INT8
    assert Quantization.INT4.of("layers.3.down.weight") is Quantization.INT4
    assert Quantization.NONE.of("head.weight") is Quantization.NONE
