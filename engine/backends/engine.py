"""Builds what a rank runs for `--backend deepspeed`. Called by `engine.engine.load_engine` alone, since importing
this module takes seconds."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.backends.loading import load_model, logit_widths
from engine.backends.model_facts import HuggingFaceModel
from engine.engine import (
    Engine,
    EngineSettings,
    LoadedEngine,
    affordable_blocks,
    new_sampler,
    scheduler_limits,
)
from engine.execution.batch import SequenceTable
from engine.execution.kv_cache import BLOCK_SIZE
from engine.execution.stage import StageRunner
from engine.world import World


def load_deepspeed(
    world: World, settings: EngineSettings, device: torch.device, on_load: Callable[[int, int], None]
) -> LoadedEngine:
    """See `load_engine`."""
    facts = HuggingFaceModel.from_folder(settings.model_dir)
    facts.check_shape(world.at.tp, world.at.pp)
    dtype = getattr(torch, facts.resolve_dtype(settings.dtype))
    limits = scheduler_limits(settings, facts)
    sampler = new_sampler(settings, facts) if world.at.is_sampler else None
    loaded = load_model(world, settings.model_dir, facts, dtype, device, on_load)
    # Only the cut model knows what its cache takes; by then every rank of the host has its weights.
    world.control.barrier()
    block_bytes = loaded.layers.elements_per_block * dtype.itemsize
    num_blocks = world.control.agree_min(
        affordable_blocks(settings, limits, block_bytes, device, world.local_size)
    )
    table = SequenceTable(limits.max_num_seqs, limits.max_model_len, BLOCK_SIZE, device)

    def reserve() -> Engine:
        cache = loaded.layers.new_cache(num_blocks, dtype)
        widths = logit_widths(world, facts)
        runner = StageRunner(world, loaded.stage, cache, table, facts.hidden_size, widths, sampler)
        return Engine(facts, runner, limits, num_blocks, computed_by="DeepSpeed and transformers")

    return LoadedEngine(num_blocks, reserve)
