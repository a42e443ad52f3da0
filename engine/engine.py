"""Builds what a rank runs: its stage with weights and cache, and at rank 0 the scheduler.

Called by `engine.rank`, and by world tests that drive a world without processes around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.execution.batch import SequenceTable
from engine.execution.grammar import Grammars
from engine.execution.kv_cache import (
    BLOCK_SIZE,
    DEFAULT_MEMORY_SHARE,
    KVCache,
    block_bytes,
    free_memory_bytes,
)
from engine.execution.sampler import Sampler
from engine.execution.stage import Stage, StageRunner
from engine.kernels.bindings import Kernels, open_kernels
from engine.kernels.library import INSTRUCTION_SETS, KernelsUnavailable, refused_amx
from engine.kernels.quantization import Quantization
from engine.kernels.stage import NativeStage, cache_head_dim
from engine.models.config import ModelConfig
from engine.models.decoder import DecoderStage
from engine.models.sharding import shard_world
from engine.models.weights import load_stage_weights
from engine.scheduling.kv_blocks import BlockPool
from engine.scheduling.pace import STEP_FACTOR, Pace
from engine.scheduling.scheduler import Scheduler, SchedulerLimits
from engine.world import World

if TYPE_CHECKING:
    from engine.backends.model_facts import HuggingFaceModel

_CUDA_MEMORY_SHARE = 0.9


class ConfigurationError(Exception):
    """The world cannot run as it was asked to; no relaunch would help. The text names the flag and the fix."""


@dataclass(frozen=True)
class EngineSettings:
    """What the user asked of the engine. Zero means the default."""

    model_dir: Path
    shard_cache: Path
    dtype: str = "auto"
    max_model_len: int = 0
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    kv_cache_bytes: int = 0
    """Memory of the KV cache on each rank."""
    kv_cache_blocks: int = 0
    """Blocks of the KV cache, whatever they take: what the world before this one had."""
    step_factor: float = STEP_FACTOR
    """How many times as long as a decode step one may take that computes a prompt beside streams; 0: as long as
    max_num_batched_tokens take."""
    memory_share: float = 1.0
    """Of the memory that the default takes for the KV cache."""
    backend: str = "auto"
    """What computes the layers: `phalanx` is our decoder, `deepspeed` see `engine.backends`; `auto` is `phalanx`."""
    expert_parallel: bool = False
    """Each tensor-parallel rank holds whole experts, not some columns of each."""
    quantization: str = "none"
    """What the matrices are kept in: `none` (the dtype), `int8`, or `int4`; see engine.kernels.quantization."""
    kernels: str = "auto"
    """Instruction set of the native kernels; "auto": the best, or torch if there are none; "off": torch."""
    deterministic: bool = False
    """A request's logits have the same bits whatever runs beside it, however its prompt was cut, and after a
    replay."""

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ConfigurationError(f"--max-num-seqs {self.max_num_seqs} is too small; it must be 1 or more")
        if self.step_factor and self.step_factor < 1.5:
            raise ConfigurationError(
                f"--step-factor {self.step_factor:g} leaves prompts no room; allowed: 1.5 or more, or 0: no bound"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigurationError(
                f"--max-num-batched-tokens {self.max_num_batched_tokens} is below --max-num-seqs "
                f"{self.max_num_seqs}; a step must have room for one token of every sequence"
            )


@dataclass(frozen=True)
class Engine:
    """One rank's part of the engine."""

    config: ModelConfig | HuggingFaceModel
    runner: StageRunner
    limits: SchedulerLimits
    num_blocks: int
    """KV blocks of the world: what the rank with the least room has."""
    step_factor: float = STEP_FACTOR
    """See EngineSettings."""
    computed_by: str = "torch"
    """What computes the layers, for the log."""

    def new_scheduler(self, num_slots: int) -> Scheduler:
        """Rank 0's scheduler over the world's blocks."""
        return Scheduler(BlockPool(self.num_blocks, BLOCK_SIZE), self.limits, num_slots, self._pace())

    def _pace(self) -> Pace | None:
        return Pace(self.step_factor) if self.step_factor else None

    @property
    def kv_cache_tokens(self) -> int:
        return self.num_blocks * BLOCK_SIZE


@dataclass(frozen=True)
class LoadedEngine:
    """One rank's part of the engine without its KV cache: what a hot spare waits with."""

    num_blocks: int
    """KV blocks that the ranks have agreed on."""
    _reserve: Callable[[], Engine]

    def reserve_cache(self) -> Engine:
        """Reserves the KV cache, after which steps can run. Call it once."""
        return self._reserve()


def build_engine(
    world: World, settings: EngineSettings, device: torch.device, on_load: Callable[[int, int], None]
) -> Engine:
    """Loads this rank's shard and reserves its cache: see load_engine."""
    return load_engine(world, settings, device, on_load).reserve_cache()


def load_engine(
    world: World, settings: EngineSettings, device: torch.device, on_load: Callable[[int, int], None]
) -> LoadedEngine:
    """Loads this rank's shard. Every rank calls it; raises ConfigurationError or ModelError.
    `on_load(done_bytes, total_bytes)` is called as weights come in."""
    if settings.backend == "deepspeed":
        for flag, is_set in (
            ("--deterministic", settings.deterministic),
            ("--quantization", settings.quantization != "none"),
        ):
            if is_set:
                raise ConfigurationError(
                    f"{flag} needs the native kernels, which --backend deepspeed does not use"
                )
        from engine.backends.engine import load_deepspeed  # takes seconds to import

        return load_deepspeed(world, settings, device, on_load)
    config = ModelConfig.from_folder(settings.model_dir)
    at = world.at
    shapes = shard_world(config, at.tp, at.pp, settings.expert_parallel)
    shape = shapes[at.pp_rank][at.tp_rank]
    dtype = getattr(torch, config.dtype if settings.dtype == "auto" else settings.dtype)
    if settings.quantization != "none" and dtype is not torch.bfloat16:
        raise ConfigurationError(
            f"--quantization {settings.quantization} computes in bfloat16; leave --dtype {settings.dtype} out"
        )
    limits = scheduler_limits(settings, config)
    sampler = new_sampler(settings, config) if at.is_sampler else None
    kernels, computed_by = _agree_on_kernels(world, settings, device)
    head_dim = config.head_dim if kernels is None else cache_head_dim(config)
    if settings.deterministic:
        world.tensor_group.sum_in_rank_order()
    # Before the weights are there, so that every rank of a host sees the same amount.
    num_blocks = world.control.agree_min(
        affordable_blocks(
            settings,
            limits,
            block_bytes(len(shape.layers), len(shape.kv_heads), head_dim, dtype),
            device,
            world.local_size,
        )
    )
    weights = load_stage_weights(
        settings.model_dir,
        config,
        shape,
        at.tp_rank,
        at.tp,
        at.pp_rank,
        at.pp,
        dtype,
        settings.shard_cache,
        on_load,
        packed=kernels is not None,
        quantization=Quantization(settings.quantization),
    )
    if device.type != "cpu":
        weights = {name: tensor.to(device) for name, tensor in weights.items()}
    max_model_len = limits.max_model_len
    stage: Stage
    if kernels is None:
        stage = DecoderStage(config, shape, weights, world.tensor_group, max_model_len)
    else:
        stage = NativeStage(config, shape, weights, world.tensor_group, max_model_len, kernels, dtype)
    table = SequenceTable(limits.max_num_seqs, max_model_len, BLOCK_SIZE, device, kernels is None)
    widths = [len(other.vocab) for other in shapes[at.pp_rank]]

    def reserve() -> Engine:
        cache = KVCache(shape.layers, num_blocks, len(shape.kv_heads), head_dim, dtype, device)
        runner = StageRunner(world, stage, cache, table, config.hidden_size, widths, sampler)
        return Engine(config, runner, limits, num_blocks, settings.step_factor, computed_by)

    return LoadedEngine(num_blocks, reserve)


def _agree_on_kernels(
    world: World, settings: EngineSettings, device: torch.device
) -> tuple[Kernels | None, str]:
    """What `_choose_kernels` finds, or less where another rank has less: ranks that share sums cut prompts alike, and
    who computes natively has no logits for one that does not."""
    kernels, computed_by = _choose_kernels(settings, device)
    strength = 0 if kernels is None else 1 + INSTRUCTION_SETS.index(kernels.instruction_set)
    common = world.control.agree_min(strength)
    if common == strength:
        return kernels, computed_by
    assert kernels is not None
    kernels.close()
    name = "off" if common == 0 else INSTRUCTION_SETS[common - 1]
    kernels, computed_by = _choose_kernels(replace(settings, kernels=name), device)
    return kernels, f"{computed_by}; another rank has nothing better"


def _choose_kernels(settings: EngineSettings, device: torch.device) -> tuple[Kernels | None, str]:
    """The native kernels, or None where torch computes; and a line that says so. Raises ConfigurationError."""
    try:
        if device.type != "cpu":
            raise KernelsUnavailable("the native kernels are for CPUs")
        kernels = open_kernels(torch.get_num_threads(), settings.kernels)
    except KernelsUnavailable as reason:
        if settings.deterministic:
            raise ConfigurationError(f"--deterministic needs the native kernels: {reason}") from None
        if settings.quantization != "none":
            raise ConfigurationError(
                f"--quantization {settings.quantization} needs the native kernels: {reason}"
            ) from None
        if settings.kernels not in ("auto", "off"):
            raise ConfigurationError(str(reason)) from None
        return None, f"torch ({reason})"
    line = f"native kernels ({kernels.instruction_set}, {kernels.threads} threads)"
    if settings.kernels == "auto" and (refused := refused_amx()) is not None:
        line += f"; without AMX: {refused}"
    return kernels, line


def scheduler_limits(settings: EngineSettings, config: ModelConfig | HuggingFaceModel) -> SchedulerLimits:
    """Raises ConfigurationError for a length that the model does not have."""
    max_model_len = settings.max_model_len or config.max_model_len
    if max_model_len > config.max_model_len:
        reason = ""
        if isinstance(config, ModelConfig) and config.rope.scaling == "longrope":
            reason = " (longrope: beyond it the model turns all keys otherwise, also those that are cached)"
        raise ConfigurationError(
            f"--max-model-len {max_model_len} is beyond the model's own length of {config.max_model_len}{reason}; "
            f"it may be 1 to {config.max_model_len}"
        )
    return SchedulerLimits(max_model_len, settings.max_num_seqs, settings.max_num_batched_tokens)


def new_sampler(settings: EngineSettings, config: ModelConfig | HuggingFaceModel) -> Sampler:
    """For the sampling rank."""
    return Sampler(Grammars(settings.model_dir / "tokenizer.json", config.vocab_size, config.eos_token_ids))


def affordable_blocks(
    settings: EngineSettings,
    limits: SchedulerLimits,
    bytes_per_block: int,
    device: torch.device,
    local_size: int,
) -> int:
    """KV blocks that this rank has memory for, or that the user asked for. Raises ConfigurationError for none."""
    if settings.kv_cache_blocks:
        return settings.kv_cache_blocks
    if settings.kv_cache_bytes:
        budget = settings.kv_cache_bytes
    elif device.type == "cuda":
        budget = int(free_memory_bytes(device) * _CUDA_MEMORY_SHARE * settings.memory_share)
    else:
        share = DEFAULT_MEMORY_SHARE * settings.memory_share / local_size
        budget = int(free_memory_bytes(device) * share)
    affordable = budget // bytes_per_block
    if affordable < 1:
        raise ConfigurationError(
            f"--kv-cache-memory {budget} bytes holds no block of {BLOCK_SIZE} tokens, which takes {bytes_per_block}"
        )
    # More than every sequence at full length is never used.
    useful = limits.max_num_seqs * -(-limits.max_model_len // BLOCK_SIZE)
    return min(affordable, useful)
