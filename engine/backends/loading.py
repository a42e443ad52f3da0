"""Loads a rank's part of a model for `--backend deepspeed`, and proves that it computes what transformers does.

Called by `engine.engine.load_engine`. The files are mapped and cut; a rank copies its own parts only. The shard cache
is not used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.backends import paged_interface
from engine.backends.deepspeed_tp import cut_linears
from engine.backends.model_facts import HuggingFaceModel, model_class
from engine.backends.paged_interface import (
    ATTENTION,
    LayerProbe,
    PagedLayers,
    StepNotHandedOn,
    hand_on_step,
)
from engine.backends.self_check import cache_blocks, compare, compute_reference, sequences
from engine.backends.transformers_stage import TransformersStage, body_forward
from engine.models.errors import ModelError
from engine.models.source_files import SourceFiles
from engine.world import World

_PROBE_TOKENS = 4


@dataclass(frozen=True)
class LoadedModel:
    """A rank's cut model, proved against the whole one."""

    stage: TransformersStage
    layers: PagedLayers


def load_model(
    world: World,
    folder: Path,
    facts: HuggingFaceModel,
    dtype: torch.dtype,
    device: torch.device,
    on_load: Callable[[int, int], None],
) -> LoadedModel:
    """Every rank calls it. Raises ModelError for a model that DeepSpeed cannot cut, or that then computes something
    else than transformers does."""
    num_bytes = sum(path.stat().st_size for path in SourceFiles(folder).paths)
    on_load(0, num_bytes)
    paged_interface.register()
    with torch.inference_mode():
        model = _map_model(folder, facts.architecture)
        first, second = sequences(facts)
        reference = None
        if world.at.is_sampler:
            with _refusing(f"transformers itself cannot run {facts.architecture}"):
                reference = compute_reference(model, first, second)
        _use_paged_attention(model)
        if world.at.tp > 1:
            cut_linears(model, world.tensor_group, world.at.tp_rank)
        _settle(model, dtype, device)
        layers = _probe(model, facts, world.at.tp)
        stage = TransformersStage(model, layers, gives_logits=world.at.tp_rank == 0)
        widths = logit_widths(world, facts)
        cache = layers.new_cache(cache_blocks(first), dtype)
        with _refusing(f"--backend deepspeed cannot run {facts.architecture}"):
            compare(world, stage, cache, widths, dtype, first, second, reference)
    on_load(num_bytes, num_bytes)
    return LoadedModel(stage, layers)


def logit_widths(world: World, facts: HuggingFaceModel) -> list[int]:
    """Columns of the logits that each tensor-parallel rank hands to the sampler."""
    return [facts.vocab_size] + [0] * (world.at.tp - 1)


def _map_model(folder: Path, architecture: str) -> Any:
    """The whole model, its weights views of the mapped files in their own type: no memory is taken for them."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with _refusing(f"transformers cannot load {folder} as {architecture}"):
        model = model_class(architecture).from_pretrained(
            folder, dtype="auto", attn_implementation="eager", local_files_only=True, use_safetensors=True
        )
    return model.eval()


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """What a model's own code throws is a reason not to serve it, in one line."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{what}: {' '.join(str(error).split()) or repr(error)}") from error


def _use_paged_attention(model: Any) -> None:
    model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:
        raise ModelError(
            f"--backend deepspeed cannot run {type(model).__name__}: its attention cannot be replaced through "
            "transformers' attention interface"
        )


def _settle(model: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Copies what is left of each weight to where and as what it is computed with, one at a time, so that nothing
    holds on to the mapped files. Weights that the model keeps in another type than the rest stay in theirs."""
    own_dtype = model.dtype
    for parameter in model.parameters():
        wanted = dtype if parameter.dtype == own_dtype else parameter.dtype
        parameter.data = torch.empty(parameter.shape, dtype=wanted, device=device).copy_(parameter.data)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device, copy=True)


def _probe(model: Any, facts: HuggingFaceModel, tp: int) -> PagedLayers:
    """Runs a few tokens through the cut model to see what each of its layers asks of attention."""
    positions = torch.arange(_PROBE_TOKENS, device=model.device)
    token_ids = positions % facts.vocab_size
    cut = f" as DeepSpeed AutoTP cuts it for --tp {tp} (--tp 1 cuts nothing)" if tp > 1 else ""
    with _refusing(f"--backend deepspeed cannot run {facts.architecture}{cut}"):
        try:
            probe = LayerProbe()
            body_forward(model, token_ids, positions, probe)
        except StepNotHandedOn:
            hand_on_step(model)
            probe = LayerProbe()
            body_forward(model, token_ids, positions, probe)
    if len(probe.layers) != facts.num_layers:
        raise ModelError(
            f"--backend deepspeed cannot run {facts.architecture}: only {len(probe.layers)} of its "
            f"{facts.num_layers} layers go through transformers' attention interface"
        )
    if facts.window is not None and all(layer.window is None for layer in probe.layers.values()):
        raise ModelError(
            f"--backend deepspeed cannot run {facts.architecture}: it has sliding windows, and does not tell "
            "attention of them"
        )
    return PagedLayers(probe.layers, model.device)
