"""The types of GGUF tensors, against decoders that are written out here from the layouts of ggml-common.h."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from engine.models.errors import ModelError
from engine.models.gguf_file import GgufFile, to_bfloat16

Kind = gguf.GGMLQuantizationType


def half(block: bytes, at: int) -> float:
    return float(np.frombuffer(block, np.float16, 1, at)[0])


def low_then_high(block: bytes, at: int) -> list[int]:
    """Sixteen bytes hold 32 numbers: the lower halves first."""
    return [byte & 15 for byte in block[at : at + 16]] + [byte >> 4 for byte in block[at : at + 16]]


def q8_0(block: bytes) -> list[float]:
    return [half(block, 0) * value for value in np.frombuffer(block, np.int8, 32, 2).tolist()]


def q4_0(block: bytes) -> list[float]:
    return [half(block, 0) * (value - 8) for value in low_then_high(block, 2)]


def q4_1(block: bytes) -> list[float]:
    return [half(block, 0) * value + half(block, 2) for value in low_then_high(block, 4)]


def with_fifth_bit(block: bytes, at: int) -> list[int]:
    bits = int.from_bytes(block[at : at + 4], "little")
    return [value | (bits >> index & 1) << 4 for index, value in enumerate(low_then_high(block, at + 4))]


def q5_0(block: bytes) -> list[float]:
    return [half(block, 0) * (value - 16) for value in with_fifth_bit(block, 2)]


def q5_1(block: bytes) -> list[float]:
    return [half(block, 0) * value + half(block, 2) for value in with_fifth_bit(block, 4)]


def scales_and_minima(block: bytes) -> list[tuple[int, int]]:
    """Eight pairs of six bits each in twelve bytes, behind the two halves that all blocks of this kind begin with."""
    packed = block[4:16]
    pairs = [(packed[index] & 63, packed[index + 4] & 63) for index in range(4)]
    for index in range(4, 8):
        scale = packed[index + 4] & 15 | (packed[index - 4] >> 6) << 4
        pairs.append((scale, packed[index + 4] >> 4 | (packed[index] >> 6) << 4))
    return pairs


def q4_k(block: bytes) -> list[float]:
    values = []
    for group, (scale, minimum) in enumerate(scales_and_minima(block)):
        pairs = block[16 + group // 2 * 32 :][:32]
        for byte in pairs:
            number = byte >> 4 if group % 2 else byte & 15
            values.append(half(block, 0) * scale * number - half(block, 2) * minimum)
    return values


def q5_k(block: bytes) -> list[float]:
    values = []
    high = block[16:48]
    for group, (scale, minimum) in enumerate(scales_and_minima(block)):
        pairs = block[48 + group // 2 * 32 :][:32]
        for index, byte in enumerate(pairs):
            number = (byte >> 4 if group % 2 else byte & 15) + 16 * (high[index] >> group & 1)
            values.append(half(block, 0) * scale * number - half(block, 2) * minimum)
    return values


def q6_k(block: bytes) -> list[float]:
    low, high, scales = block[:128], block[128:192], np.frombuffer(block, np.int8, 16, 192).tolist()
    values = [0.0] * 256
    for part in range(2):
        for index in range(32):
            first, second = low[64 * part + index], low[64 * part + 32 + index]
            bits = high[32 * part + index]
            numbers = (
                first & 15 | (bits & 3) << 4,
                second & 15 | (bits >> 2 & 3) << 4,
                first >> 4 | (bits >> 4 & 3) << 4,
                second >> 4 | (bits >> 6) << 4,
            )
            for row, number in enumerate(numbers):
                scale = scales[8 * part + 2 * row + index // 16]
                values[128 * part + 32 * row + index] = half(block, 208) * scale * (number - 32)
    return values


DECODERS: dict[Kind, tuple[Callable[[bytes], list[float]], tuple[int, ...]]] = {
    Kind.Q8_0: (q8_0, (0,)),
    Kind.Q4_0: (q4_0, (0,)),
    Kind.Q4_1: (q4_1, (0, 2)),
    Kind.Q5_0: (q5_0, (0,)),
    Kind.Q5_1: (q5_1, (0, 2)),
    Kind.Q4_K: (q4_k, (0, 2)),
    Kind.Q5_K: (q5_k, (0, 2)),
    Kind.Q6_K: (q6_k, (208,)),
}
"""And where in a block its floats of 16 bits lie."""


def write(file: Path, tensor: np.ndarray, kind: Kind | None = None) -> GgufFile:
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("some.weight", tensor, raw_dtype=kind)
    for part in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        part()
    writer.close()
    return GgufFile(file)


def read(file: GgufFile, order: np.ndarray | None = None, expert: int | None = None) -> np.ndarray:
    return np.concatenate(list(file.rows("some.weight", order, expert)))


@pytest.mark.parametrize("kind", DECODERS, ids=lambda kind: kind.name)
def test_blocks_of_any_bits(tmp_path: Path, kind: Kind) -> None:
    decode, halves = DECODERS[kind]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(kind.value)
    rows, blocks = 6, 3
    data = random.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for at in halves:  # bits that stand for no number are nobody's quantization
        scale = random.normal(0, 0.1, (rows, blocks, 1)).astype(np.float16)
        data[:, :, at : at + 2] = scale.view(np.uint8)
    expected = np.array([[decode(block.tobytes()) for block in row] for row in data], np.float64)
    expected = expected.reshape(rows, blocks * elements)
    file = write(tmp_path / "file.gguf", data.reshape(rows, -1), kind)
    assert file.shape("some.weight") == (rows, blocks * elements)
    found = read(file)
    assert found.dtype == np.float32
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-6)
    order = random.permutation(rows)
    assert np.array_equal(read(file, order), found[order])


@pytest.mark.parametrize(
    "kind", [kind for kind in DECODERS if not kind.name.endswith("K")], ids=lambda k: k.name
)
def test_what_was_quantized_comes_back(tmp_path: Path, kind: Kind) -> None:
    values = np.random.default_rng(0).normal(0, 1, (8, 64)).astype(np.float32)
    found = read(write(tmp_path / "file.gguf", gguf.quants.quantize(values, kind), kind))
    steps = {Kind.Q8_0: 254, Kind.Q5_0: 31, Kind.Q5_1: 31}.get(kind, 15)
    assert np.abs(found - values).max() < 1.05 * 2 * np.abs(values).max() / steps


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16], ids=lambda kind: kind.name)
def test_floats_are_exact(tmp_path: Path, kind: Kind) -> None:
    values = np.random.default_rng(0).integers(-128, 128, (8, 64)).astype(np.float32) / 64
    data = gguf.quants.quantize(values, kind)
    assert np.array_equal(read(write(tmp_path / "file.gguf", data, kind)), values)


def test_one_of_several_in_a_tensor(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(0, 1, (3, 8, 64)).astype(np.float32)
    file = write(tmp_path / "file.gguf", gguf.quants.quantize(values, Kind.Q8_0), Kind.Q8_0)
    assert file.shape("some.weight") == (3, 8, 64)
    for expert in range(3):
        assert np.abs(read(file, expert=expert) - values[expert]).max() < 0.02


def test_rounding_to_bfloat16_is_to_the_nearest_and_ties_to_even() -> None:
    bits = np.array([0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF], np.uint32)
    assert to_bfloat16(bits.view(np.float32)).tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0x7F80]
    assert to_bfloat16(np.array([np.nan], np.float32)).tolist() == [0x7FC0]


def test_a_type_that_nobody_knows(tmp_path: Path) -> None:
    file = tmp_path / "file.gguf"
    write(file, np.zeros((2, 32), np.float32))
    content = file.read_bytes()
    # Behind its name a tensor's entry holds the number of dimensions, two of them, and the type.
    at = content.index(b"some.weight") + len(b"some.weight") + 4 + 16
    file.write_bytes(content[:at] + (199).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(
        ModelError, match=r"file\.gguf: tensor some\.weight is of type 199, which is not known"
    ):
        GgufFile(file)
