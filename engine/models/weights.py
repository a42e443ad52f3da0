"""The weights of one rank, cut out of the model's files once and mapped into memory ever after.

Called by each rank when it loads its stage. What is cut, and how, stands in `sharding`; this module carries
it out, and never holds more than one piece of a tensor in memory of its own.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.kernels.quantization import Quantization
from engine.models.config import ModelConfig
from engine.models.content_hash import ContentHashes, record_path
from engine.models.errors import ModelError
from engine.models.locks import locked
from engine.models.shard_cache import FolderUse, ShardCache
from engine.models.shard_file import DTYPE_NAMES, LAYOUT_VERSION, MappedShard, ShardFile, populate
from engine.models.sharding import LocalTensor, RankShape, local_tensors
from engine.models.source_files import SourceFiles

Progress = Callable[[int, int], None]
"""Is told (done_bytes, total_bytes)."""


def load_stage_weights(
    model_dir: Path,
    config: ModelConfig,
    shape: RankShape,
    tp_rank: int,
    tp: int,
    pp_rank: int,
    pp: int,
    dtype: torch.dtype,
    shard_cache: Path,
    progress: Progress,
    packed: bool = False,
    quantization: Quantization = Quantization.NONE,
) -> dict[str, Tensor]:
    """All tensors of one rank, under the local names of `sharding`, as views of one read-only mapped file.

    The first call for a source and a world's shape reads the slices that the rank needs and writes them to
    `shard_cache`; later calls map that file and copy nothing. `packed`: matrices come as `engine.kernels.packing`
    packs them, or `engine.kernels.quantization`. The tensors must not be written to (the process would die of it),
    and the file stays protected from the cache's clearing while one of them lives.

    With tied weights a stage with the head holds "embed.weight" and "head.weight", which are one object.
    `progress` is called at least every 32 MiB, and every 50 ms while another process does the work.

    Raises ModelError that names the file and the tensor if the source is not what the config says, or the
    cache cannot be written.
    """
    shard = ShardFile.of(
        [tensor for tensor in local_tensors(config, shape, tp_rank) if not _is_alias(config, shape, tensor)],
        dtype,
        packed,
        quantization,
    )
    cache = ShardCache(shard_cache)
    source = SourceFiles(model_dir)
    meter = _Meter(progress)
    identity = _identity(source, shard_cache, 2 * shard.num_bytes, meter)
    name = _folder_name(identity, tp, pp, _holds_whole_experts(config, shape), dtype, quantization)
    use = cache.use(name, model_dir.absolute())
    path = use.folder / f"stage{pp_rank}-rank{tp_rank}-{shard.digest[:12]}.safetensors"
    mapped = shard.map(path, use)
    if mapped is None:
        mapped = _build_once(shard, path, source, cache, use, meter)
    meter.expect(shard.num_bytes)
    populate(mapped, meter.advance)
    tensors = shard.views(mapped)
    if config.tie_word_embeddings and shape.has_head:
        stored = "embed.weight" if shape.has_embedding else "head.weight"
        tensors["embed.weight"] = tensors["head.weight"] = tensors[stored]
    return tensors


def _is_alias(config: ModelConfig, shape: RankShape, tensor: LocalTensor) -> bool:
    return config.tie_word_embeddings and shape.has_embedding and tensor.name == "head.weight"


def _holds_whole_experts(config: ModelConfig, shape: RankShape) -> bool:
    return config.experts is not None and len(shape.experts) < config.experts.count


def _folder_name(
    identity: str, tp: int, pp: int, expert_parallel: bool, dtype: torch.dtype, quantization: Quantization
) -> str:
    instruction_set = f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}".replace(" ", "")
    name = DTYPE_NAMES[dtype].lower()
    if quantization is not Quantization.NONE:
        name += f"-{quantization.value}"
    cut = f"tp{tp}-pp{pp}-ep" if expert_parallel else f"tp{tp}-pp{pp}"
    return f"{identity[:20]}-{cut}-{name}-v{LAYOUT_VERSION}-{instruction_set}"


def _identity(source: SourceFiles, shard_cache: Path, later_bytes: int, meter: _Meter) -> str:
    """The content hash of the source. One process computes it, once, and the others wait for it."""
    hashes = ContentHashes.for_source(shard_cache, source.folder)
    identity = source.known_identity(hashes)
    if identity is not None:
        return identity
    meter.expect(source.bytes_to_hash(hashes) + later_bytes)
    lock_file = record_path(shard_cache, source.folder).with_suffix(".lock")
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock_file, waiting=meter.wait) as lock:

        def advance(count: int) -> None:
            lock.beat()
            meter.advance(count)

        return source.identity(ContentHashes.for_source(shard_cache, source.folder), advance)


def _build_once(
    shard: ShardFile, path: Path, source: SourceFiles, cache: ShardCache, use: FolderUse, meter: _Meter
) -> MappedShard:
    """Builds a rank's file and maps it, or waits for the process that builds it already."""
    # What is built is counted twice: once written, once mapped.
    meter.expect(2 * shard.num_bytes)
    with locked(path.with_suffix(".lock"), waiting=meter.wait) as lock:

        def advance(count: int) -> None:
            lock.beat()
            meter.advance(count)

        mapped = shard.map(path, use)
        if mapped is None:
            path.unlink(missing_ok=True)  # there is none, or it is broken
            cache.make_room(shard.num_bytes)
            shard.build(path, source, advance)
            mapped = shard.map(path, use)
    if mapped is None:
        raise ModelError(f"{path} was written and cannot be read back; check the disk")
    return mapped


class _Meter:
    """Turns steps into (done, total) for the caller, never backwards."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._done = 0
        self._total = 0

    def expect(self, remaining_bytes: int) -> None:
        """What is left to do, as far as it is known now."""
        self._total = self._done + remaining_bytes
        self.wait()

    def advance(self, count: int) -> None:
        self._done = min(self._done + count, self._total)
        self.wait()

    def wait(self) -> None:
        self._progress(self._done, self._total)
