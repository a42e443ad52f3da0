"""Matrices that a GGUF file has in blocks of 32: their numbers get into the shard files unchanged, or are
rounded from the values where that cannot be."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.kernels.quantization import Quantization, dequantize
from engine.models.config import ModelConfig
from engine.models.errors import ModelError
from engine.models.sharding import local_tensors, shard_world
from engine.models.source_blocks import BLOCKS_FILE
from engine.models.weights import load_stage_weights
from tests.tiny_models import make_tiny_llama
from tests.unit.test_models_gguf import imported, write_gguf

Kind = gguf.GGMLQuantizationType
INT8, INT4 = Quantization.INT8, Quantization.INT4
HEADS, KV_HEADS, HIDDEN, MLP = 4, 2, 128, 192


def model(folder: Path, kind: Kind) -> tuple[Path, dict[str, torch.Tensor]]:
    """The import of a quantized file, and the float32 values that the file stands for."""
    plain = make_tiny_llama(
        folder / "plain", num_layers=1, num_heads=HEADS, num_kv_heads=KV_HEADS, hidden=HIDDEN, head_dim=32,
        intermediate=MLP, vocab=420, dtype="bfloat16",
    )  # fmt: skip
    target = imported(write_gguf(plain, folder / "model.gguf", kind=kind), folder / "imported")
    values = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        data = tensor.float().numpy()
        if data.ndim == 2:
            data = gguf.quants.dequantize(gguf.quants.quantize(data, kind), kind)
        values[name] = torch.from_numpy(np.asarray(data))
    return target, values


def ranks(folder: Path, tp: int, quantization: Quantization, cache: Path) -> list[dict[str, torch.Tensor]]:
    config = ModelConfig.from_folder(folder)
    shape = shard_world(config, tp=tp, pp=1)[0]
    return [
        load_stage_weights(
            folder, config, shape[rank], rank, tp, 0, 1, torch.bfloat16, cache, lambda done, total: None,
            packed=True, quantization=quantization,
        )
        for rank in range(tp)
    ]  # fmt: skip


def expected(folder: Path, tp: int, rank: int, name: str, values: dict[str, torch.Tensor]) -> torch.Tensor:
    config = ModelConfig.from_folder(folder)
    table = local_tensors(config, shard_world(config, tp=tp, pp=1)[0][rank], rank)
    pieces = next(tensor for tensor in table if tensor.name == name).slices
    return torch.cat([values[p.name].narrow(p.axis, p.start, p.stop - p.start) for p in pieces])


@pytest.mark.parametrize(
    ("kind", "quantization", "exact"),
    [
        (Kind.Q4_0, INT4, True),
        (Kind.Q4_1, INT4, True),
        (Kind.Q8_0, INT8, True),
        (Kind.Q4_0, INT8, True),
        (Kind.Q4_1, INT8, False),
        (Kind.Q8_0, INT4, False),
        (Kind.Q5_0, INT8, False),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
@pytest.mark.parametrize("tp", [1, 2])
def test_numbers_are_those_of_the_file(
    tmp_path: Path, kind: Kind, quantization: Quantization, exact: bool, tp: int
) -> None:
    folder, values = model(tmp_path, kind)
    step = 0.02 if quantization is INT8 else 0.2
    checked = 0
    for rank, tensors in enumerate(ranks(folder, tp, quantization, tmp_path / "cache")):
        for name, packed in tensors.items():
            if packed.dtype != torch.uint8:
                continue
            wanted = expected(folder, tp, rank, name, values)
            found = dequantize(packed, *wanted.shape)
            # Embedding and head have eight bits where the others have four, which hold no offset.
            if exact and not (kind is Kind.Q4_1 and name.split(".")[0] in ("embed", "head")):
                assert torch.equal(found, wanted), name
            else:
                assert (found - wanted).abs().max() <= step * wanted.abs().max(), name
            checked += 1
    assert checked >= 4 * tp


def test_embedding_and_head_keep_their_eight_bits_beside_four(tmp_path: Path) -> None:
    folder, values = model(tmp_path, Kind.Q8_0)
    (tensors,) = ranks(folder, 1, INT4, tmp_path / "cache")
    name = "model.embed_tokens.weight"
    assert torch.equal(dequantize(tensors["embed.weight"], 420, HIDDEN), values[name])


def test_a_cut_within_a_block_is_rounded_from_the_values(tmp_path: Path) -> None:
    # 192 columns of the MLP over four ranks: in sixteens.
    folder, values = model(tmp_path, Kind.Q4_1)
    whole = True
    for rank, tensors in enumerate(ranks(folder, 4, INT4, tmp_path / "cache")):
        name = next(name for name in tensors if "down" in name)
        wanted = expected(folder, 4, rank, name, values)
        found = dequantize(tensors[name], *wanted.shape)
        whole &= wanted.shape[1] % 32 == 0
        assert (found - wanted).abs().max() <= 0.2 * wanted.abs().max()
    assert not whole, "this shape is to cut blocks in two"


def test_other_blocks_are_not_kept(tmp_path: Path) -> None:
    folder, _ = model(tmp_path, Kind.Q5_0)
    assert not (folder / BLOCKS_FILE).exists()


def test_blocks_of_another_model_are_refused(tmp_path: Path) -> None:
    folder, _ = model(tmp_path / "one", Kind.Q4_0)
    other = make_tiny_llama(
        tmp_path / "plain",
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        hidden=64,
        head_dim=32,
        vocab=420,
        dtype="bfloat16",
    )
    theirs = imported(write_gguf(other, tmp_path / "other.gguf", kind=Kind.Q4_0), tmp_path / "other")
    (theirs / BLOCKS_FILE).write_bytes((folder / BLOCKS_FILE).read_bytes())
    with pytest.raises(ModelError, match=BLOCKS_FILE):
        ranks(theirs, 1, INT4, tmp_path / "cache")
