"""Loading: what the ranks hold adds up to the model; broken sources are named; nothing is copied twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.kernels.packing import pack
from engine.kernels.quantization import Quantization, quantize
from engine.models.config import ModelConfig
from engine.models.errors import ModelError
from engine.models.sharding import local_tensors, shard_world
from engine.models.weights import load_stage_weights
from tests.tiny_models import make_tiny_family, make_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", vocab=401, tie=False)


def load(
    folder: Path,
    cache: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    rank: tuple[int, int] = (0, 0),
    dtype: torch.dtype = torch.float32,
    progress: list[tuple[int, int]] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    config = ModelConfig.from_folder(folder)
    pp_rank, tp_rank = rank
    shape = shard_world(config, tp, pp)[pp_rank][tp_rank]
    told: list[tuple[int, int]] = [] if progress is None else progress
    return load_stage_weights(
        folder,
        config,
        shape,
        tp_rank,
        tp,
        pp_rank,
        pp,
        dtype,
        cache,
        lambda done, total: told.append((done, total)),
        **options,
    )


def shard_files(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.safetensors"))


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (3, 2), (4, 1), (9, 1), (1, 4)])
@pytest.mark.parametrize("options", [{"tie": True}, {"tie": False, "attention_bias": True, "mlp_bias": True}])
def test_gathered_shards_are_the_model(tmp_path: Path, tp: int, pp: int, options: dict[str, bool]) -> None:
    folder = make_tiny_llama(
        tmp_path / "model", vocab=401, intermediate=208, max_shard_size="100KB", **options
    )
    assert_shards_are_the_model(folder, tmp_path / "cache", tp, pp)


@pytest.mark.parametrize("name", ["phi3", "qwen3", "olmo2", "gemma2", "mixtral", "qwen3-moe"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (3, 2), (4, 1)])
def test_gathered_shards_of_every_family(tmp_path: Path, name: str, tp: int, pp: int) -> None:
    folder = make_tiny_family(tmp_path / "model", name)
    assert_shards_are_the_model(folder, tmp_path / "cache", tp, pp)


@pytest.mark.parametrize("quantization", [Quantization.NONE, Quantization.INT8])
def test_each_expert_begins_with_a_panel_of_its_own(tmp_path: Path, quantization: Quantization) -> None:
    folder = make_tiny_family(tmp_path / "model", "qwen3-moe-plain", num_hidden_layers=1)
    plain = load(folder, tmp_path / "cache", tp=2)
    packed = load(folder, tmp_path / "cache", tp=2, packed=True, quantization=quantization)
    for name in ("layers.0.experts_gate_up.weight", "layers.0.experts_down.weight"):
        experts = plain[name].chunk(5)
        assert experts[0].shape[0] % 16, "nothing needs padding here"
        for expert, found in zip(experts, packed[name].chunk(5), strict=True):
            if quantization is Quantization.NONE:
                assert torch.equal(found, pack(expert))
            else:
                assert torch.equal(found, quantize(expert, quantization))


def assert_shards_are_the_model(folder: Path, cache: Path, tp: int, pp: int) -> None:
    config = ModelConfig.from_folder(folder)
    source: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        source |= load_file(file)
    gathered = {name: torch.full_like(tensor, torch.nan) for name, tensor in source.items()}
    for pp_rank, stage in enumerate(shard_world(config, tp, pp)):
        for tp_rank, shape in enumerate(stage):
            tensors = load(folder, cache, tp=tp, pp=pp, rank=(pp_rank, tp_rank))
            described = {tensor.name: tensor for tensor in local_tensors(config, shape, tp_rank)}
            assert set(tensors) - {"embed.weight"} == set(described) - {"embed.weight"}
            for name, tensor in described.items():
                assert tensors[name].shape == tensor.shape
                sizes = [piece.sliced_shape[0] for piece in tensor.slices]
                for piece, part in zip(tensor.slices, tensors[name].split(sizes), strict=True):
                    gathered[piece.name].narrow(piece.axis, piece.start, piece.stop - piece.start).copy_(part)
    for name, tensor in source.items():
        assert torch.equal(gathered[name], tensor), name


def test_local_names(model: Path, tmp_path: Path) -> None:
    tensors = load(model, tmp_path, tp=2, rank=(0, 1))
    config = ModelConfig.from_folder(model)
    shape = shard_world(config, 2, 1)[0][1]
    vocab, columns = len(shape.vocab), len(shape.mlp_columns)
    assert tensors["embed.weight"].shape == tensors["head.weight"].shape == (vocab, 144)
    assert tensors["norm.weight"].shape == (144,)
    assert tensors["layers.3.qkv.weight"].shape == ((4 + 2 * 2) * 16, 144)
    assert tensors["layers.3.output.weight"].shape == (144, 4 * 16)
    assert tensors["layers.3.gate_up.weight"].shape == (2 * columns, 144)
    assert tensors["layers.3.down.weight"].shape == (144, columns)
    assert tensors["layers.3.attention_norm.weight"].shape == (144,)
    assert tensors["layers.3.mlp_norm.weight"].shape == (144,)
    assert len(tensors) == 3 + 4 * 6


def test_tied_weights_are_one_object(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model")
    whole = load(folder, tmp_path / "cache")
    assert whole["head.weight"] is whole["embed.weight"]
    last = load(folder, tmp_path / "cache", pp=2, rank=(1, 0))
    assert last["head.weight"] is last["embed.weight"]
    assert torch.equal(last["head.weight"], whole["embed.weight"])
    assert "embed.weight" not in {
        name for file in shard_files(tmp_path / "cache") if "stage1" in file.name for name in keys(file)
    }


def keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_types_are_converted(tmp_path: Path, stored: str, wanted: torch.dtype) -> None:
    folder = make_tiny_llama(tmp_path / "model", num_layers=1, dtype=stored)
    tensors = load(folder, tmp_path / "cache", dtype=wanted)
    source = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert tensors["layers.0.down.weight"].dtype == wanted
    assert torch.equal(tensors["layers.0.down.weight"], source.to(wanted))


def test_tensors_are_aligned_and_the_file_is_plain_safetensors(model: Path, tmp_path: Path) -> None:
    tensors = load(model, tmp_path, tp=4, rank=(0, 2), dtype=torch.bfloat16)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors.values())
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    (file,) = shard_files(tmp_path)
    read_back = load_file(file)
    assert all(torch.equal(read_back[name], tensor) for name, tensor in tensors.items())


def test_progress_rises_to_its_total(model: Path, tmp_path: Path) -> None:
    first: list[tuple[int, int]] = []
    load(model, tmp_path, progress=first)
    again: list[tuple[int, int]] = []
    load(model, tmp_path, progress=again)
    for told in (first, again):
        done = [count for count, _ in told]
        assert done == sorted(done)
        assert told[-1][0] == told[-1][1] > 0
        assert all(count <= total for count, total in told)
    (file,) = shard_files(tmp_path)
    assert again[-1][1] == file.stat().st_size
    assert first[-1][1] == 2 * file.stat().st_size + (model / "model.safetensors").stat().st_size


# --------------------------------------------------------------------------- the cache


def test_the_second_load_neither_reads_the_source_nor_writes(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model")
    expected = {name: tensor.clone() for name, tensor in load(folder, tmp_path / "cache").items()}
    (file,) = shard_files(tmp_path / "cache")
    before = file.stat()
    # The same size, time and inode with nothing in it: who reads it fails.
    source = folder / "model.safetensors"
    status = source.stat()
    with source.open("r+b") as opened:
        opened.write(bytes(status.st_size))
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = load(folder, tmp_path / "cache")
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    after = file.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


_MEASURE = """
import sys
from pathlib import Path
import torch
from tests.unit.test_models_weights import load

def memory():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return kib["Anonymous"], kib["Rss"] - kib["Anonymous"]

before = memory()
tensors = load(Path(sys.argv[1]), Path(sys.argv[2]))
after = memory()
total = sum(tensor.nbytes for name, tensor in tensors.items() if name != "head.weight") // 1024
print(total, after[0] - before[0], after[1] - before[1])
"""


def test_the_second_load_copies_nothing(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model", num_heads=8, num_kv_heads=8, hidden=1024, intermediate=4096)
    load(folder, tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, folder, tmp_path / "cache"],
        check=True, timeout=60, capture_output=True, text=True,
    )  # fmt: skip
    total_kib, anonymous_kib, mapped_kib = map(int, done.stdout.split())
    assert total_kib > 50_000
    assert anonymous_kib < 0.05 * total_kib, "memory of the process's own grew with the weights"
    assert mapped_kib > 0.95 * total_kib, "the file is mapped, and in memory already"


def test_a_changed_source_is_cut_anew(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model", num_layers=1)
    old = load(folder, tmp_path / "cache")["layers.0.down.weight"].clone()
    source = load_file(folder / "model.safetensors")
    source["model.layers.0.mlp.down_proj.weight"] += 1
    save_file(source, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(load(folder, tmp_path / "cache")["layers.0.down.weight"], old + 1)
    assert len(shard_files(tmp_path / "cache")) == 2


def test_a_moved_source_is_the_same_source(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model", num_layers=1)
    load(folder, tmp_path / "cache")
    folder.rename(tmp_path / "moved")
    load(tmp_path / "moved", tmp_path / "cache")
    assert len(shard_files(tmp_path / "cache")) == 1


def _cut_short(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _other_header(data: bytes) -> bytes:
    return data[:40] + b"?" + data[41:]


def _empty(data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [_cut_short, _other_header, _empty])
def test_a_broken_shard_file_is_rebuilt(
    model: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    expected = {name: tensor.clone() for name, tensor in load(model, tmp_path).items()}
    (file,) = shard_files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    rebuilt = load(model, tmp_path)
    assert file.read_bytes() == whole
    assert all(torch.equal(rebuilt[name], tensor) for name, tensor in expected.items())


def test_what_a_killed_builder_left_is_cleared(model: Path, tmp_path: Path) -> None:
    load(model, tmp_path)
    (file,) = shard_files(tmp_path)
    leftover = file.with_name(f"{file.stem}.99999.partial")
    file.rename(leftover)
    load(model, tmp_path)
    assert shard_files(tmp_path) == [file]
    assert not leftover.exists()


def test_a_broken_record_of_hashes_is_made_anew(model: Path, tmp_path: Path) -> None:
    load(model, tmp_path)
    (record,) = (tmp_path / "sources").glob("*.json")
    whole = record.read_text()
    for text in ("", "[]", '{"version": 1, "files": []}', whole.replace("1", "2")):
        record.write_text(text)
        load(model, tmp_path)
        assert json.loads(record.read_text()) == json.loads(whole)


# --------------------------------------------------------------------------- broken sources


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "model", num_layers=1, num_heads=2, num_kv_heads=1)


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ModelError) as error:
        load(folder, folder.parent / "cache")
    for word in words:
        assert word in str(error.value)
    assert not shard_files(folder.parent / "cache")
    assert not list((folder.parent / "cache").glob("*/*.partial"))


def change(folder: Path, name: str, tensor: Tensor | None) -> None:
    file = folder / "model.safetensors"
    source = {key: value.clone() for key, value in load_file(file).items()}
    if tensor is None:
        del source[name]
    else:
        source[name] = tensor
    save_file(source, file, {"format": "pt"})


DOWN = "model.layers.0.mlp.down_proj.weight"


def test_a_missing_tensor(broken: Path) -> None:
    change(broken, DOWN, None)
    refused(broken, "model.safetensors", DOWN, "missing")


def test_a_wrong_shape(broken: Path) -> None:
    change(broken, DOWN, torch.zeros(32, 95))
    refused(broken, "model.safetensors", DOWN, "[32, 95]", "[32, 96]")


def test_a_wrong_type(broken: Path) -> None:
    change(broken, DOWN, torch.zeros(32, 96, dtype=torch.int8))
    refused(broken, "model.safetensors", DOWN, "I8", "BF16")


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_a_truncated_file(broken: Path, keep: int) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(broken, "model.safetensors", "fetch the model again")


def test_a_file_of_something_else(broken: Path) -> None:
    (broken / "model.safetensors").write_bytes(b"<html>not found</html>" * 1000)
    refused(broken, "model.safetensors")


def test_no_weights(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    refused(broken, str(broken), "no *.safetensors")
    (broken / "pytorch_model.bin").touch()
    refused(broken, "pickled", "convert")


def test_a_file_that_the_index_names_is_missing(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model", max_shard_size="100KB")
    victim = sorted(folder.glob("*.safetensors"))[2]
    victim.unlink()
    refused(folder, str(victim), "missing")


def test_a_tensor_that_the_index_lacks(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model", max_shard_size="100KB")
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    del data["weight_map"][DOWN]
    index.write_text(json.dumps(data))
    refused(folder, "index.json", DOWN, "missing")


def test_an_index_that_points_elsewhere(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model", max_shard_size="100KB")
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"][DOWN] = "../secret.safetensors"
    index.write_text(json.dumps(data))
    refused(folder, "index.json", "../secret.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ModelError, match="PHALANX_CACHE"):
        load(model, tmp_path / "cache")


def test_a_cache_that_is_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(ModelError, match="PHALANX_CACHE"):
        load(model, tmp_path / "cache")
