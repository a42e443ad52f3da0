"""Models in several files that are not whole: refused before a world starts, by file and tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.models.config import ModelConfig
from engine.models.errors import ModelError
from engine.models.sharding import shard_world
from engine.models.source_files import SourceFiles
from engine.models.weights import load_stage_weights
from tests.tiny_models import make_tiny_llama

DOWN = "model.layers.0.mlp.down_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = make_tiny_llama(
        tmp_path / "model", num_layers=2, num_heads=2, num_kv_heads=1, max_shard_size="20KB"
    )
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def refused(folder: Path, *words: str) -> None:
    """By the check before a start, and by whoever would load it without one."""
    config = ModelConfig.from_folder(folder)
    shape = shard_world(config, 1, 1)[0][0]
    cache = folder.parent / "cache"

    def check() -> None:
        SourceFiles(folder).check(config)

    def load() -> None:
        load_stage_weights(folder, config, shape, 0, 1, 0, 1, torch.bfloat16, cache, lambda done, total: None)

    for attempt in (check, load):
        with pytest.raises(ModelError) as error:
            attempt()
        for word in words:
            assert word in str(error.value)
    assert not list(cache.glob("*/*.safetensors"))


def rewrite(file: Path, tensor: str, value: torch.Tensor | None) -> None:
    tensors = {name: data.clone() for name, data in load_file(file).items()}
    del tensors[tensor]
    if value is not None:
        tensors[tensor] = value
    save_file(tensors or {"other": torch.zeros(1)}, file, {"format": "pt"})


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_shard(folder: Path, keep: int) -> None:
    shard = shard_of(folder, DOWN)
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(folder, str(shard), "fetch the model again")


def test_a_tensor_that_its_shard_lacks(folder: Path) -> None:
    shard = shard_of(folder, DOWN)
    rewrite(shard, DOWN, None)
    refused(folder, str(shard), f"tensor {DOWN} is missing")


def test_a_tensor_of_another_shape(folder: Path) -> None:
    shard = shard_of(folder, DOWN)
    rewrite(shard, DOWN, torch.zeros(32, 64))
    refused(folder, str(shard), f"tensor {DOWN} has shape [32, 64]", "[32, 96]")


def test_a_tensor_of_a_type_that_is_not_read(folder: Path) -> None:
    shard = shard_of(folder, DOWN)
    rewrite(shard, DOWN, torch.zeros(32, 96, dtype=torch.int8))
    refused(folder, str(shard), f"tensor {DOWN} is of type I8", "BF16")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\0" * 100]
)
def test_an_index_of_something_else(folder: Path, content: str) -> None:
    (folder / INDEX).write_text(content)
    refused(folder, INDEX)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data_offsets", [0, 10]),
        ("data_offsets", [-100, 1]),
        ("data_offsets", [10**12, 10**12 + 12288]),
        ("data_offsets", [5]),
        ("data_offsets", "all"),
        ("shape", [10**9, 96]),
        ("shape", [-32, -96]),
        ("dtype", None),
    ],
)
def test_a_header_that_contradicts_itself(folder: Path, key: str, value: Any) -> None:
    shard = shard_of(folder, DOWN)
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[DOWN][key] = value
    changed = json.dumps(header).encode()
    shard.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])
    refused(folder, str(shard))
