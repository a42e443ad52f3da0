"""The weights of a GGUF file under Hugging Face's names, with what llama.cpp's converter did to them undone.

Called by the importer. Everything is checked against the config before the first tensor is read: that all are there,
of the right shape and of a type that can be read, and that none is there that the model would not use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.models.config import ExpertConfig, ModelConfig
from engine.models.errors import ModelError
from engine.models.gguf_families import GgufFamily
from engine.models.gguf_file import GgufFile
from engine.models.gguf_rope import ROPE_TENSORS
from engine.models.sharding import local_tensors, shard_world

if TYPE_CHECKING:
    from numpy import float32, intp, uint8

_EXPERT_MODULES = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


@dataclass(frozen=True)
class Target:
    """A tensor to be written, and where it comes from."""

    name: str
    shape: tuple[int, ...]
    source: str
    """The tensor in the GGUF file."""
    expert: int | None = None
    """Which of the experts that the source holds one after another."""


def targets(gguf: GgufFile, family: GgufFamily, config: ModelConfig) -> list[Target]:
    """Every tensor of the model. Raises ModelError that names the file and the tensor."""
    found = [
        target
        for name in gguf.tensors
        if name not in ROPE_TENSORS
        for target in _of(gguf, family, config, name)
    ]
    by_name = {target.name: target for target in found}
    needed: dict[str, tuple[int, ...]] = {}
    whole = shard_world(config, tp=1, pp=1)[0][0]
    for tensor in local_tensors(config, whole, tp_rank=0):
        for piece in tensor.slices:
            needed[piece.name] = piece.shape
    for name, shape in needed.items():
        target = by_name.get(name)
        if target is None:
            raise ModelError(
                f"{gguf.path}: tensor {_gguf_name(family, config, name)} is missing; the model is not complete"
            )
        if target.shape != shape:
            raise ModelError(
                f"{gguf.path}: tensor {target.source} has shape {list(gguf.shape(target.source))}, and the metadata "
                f"make it {list(shape)}{' for each expert' if target.expert is not None else ''}; "
                "the file is damaged or was converted wrongly"
            )
    for target in found:
        if target.name not in needed:
            raise ModelError(
                f"{gguf.path}: tensor {target.source} is none that a {config.architecture} of "
                f"{config.num_layers} layers has; the model is not of a kind that is supported"
            )
        gguf.check_type(target.source)
    return found


def rows(
    gguf: GgufFile, family: GgufFamily, config: ModelConfig, target: Target
) -> Iterator[NDArray[float32]]:
    """The tensor's rows as float32, in Hugging Face's order, some MiB at a time."""
    order = _row_order(gguf, family, config, target.source)
    offset = family.norm_offset if target.source.endswith("norm.weight") else 0.0
    for part in gguf.rows(target.source, order, target.expert):
        yield part - np.float32(offset) if offset else part


def stored_rows(
    gguf: GgufFile, family: GgufFamily, config: ModelConfig, target: Target
) -> Iterator[NDArray[uint8]]:
    """The same rows of a matrix that is quantized, as the bytes of their blocks."""
    order = _row_order(gguf, family, config, target.source)
    return gguf.stored_rows(target.source, order, target.expert)


def _of(gguf: GgufFile, family: GgufFamily, config: ModelConfig, name: str) -> list[Target]:
    """What one tensor of the file comes to."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in family.names:
        raise ModelError(
            f"{gguf.path}: tensor {name} is unknown; the model is not of a kind that is supported"
        )
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    shape = gguf.shape(name)
    experts = config.experts
    if experts is not None and match[2] == "ffn_gate_inp":
        return [Target(f"{layer}{experts.block}.gate.{match[3]}", shape, name)]
    if experts is not None and match[2] in _EXPERT_MODULES:
        if len(shape) != 3 or shape[0] != experts.count:
            raise ModelError(
                f"{gguf.path}: tensor {name} has shape {list(shape)}; it has to hold {experts.count} experts"
            )
        return [
            Target(f"{layer}{_expert_module(experts, match[2], expert)}.{match[3]}", shape[1:], name, expert)
            for expert in range(experts.count)
        ]
    return [Target(f"{layer}{family.names[match[2]]}.{match[3]}", shape, name)]


def _expert_module(experts: ExpertConfig, module: str, expert: int) -> str:
    return f"{experts.block}.experts.{expert}.{experts.projections[_EXPERT_MODULES.index(module)]}"


def _gguf_name(family: GgufFamily, config: ModelConfig, name: str) -> str:
    """What the file would call a tensor, for messages."""
    base, _, suffix = name.rpartition(".")
    layer = re.match(r"model\.layers\.(\d+)\.", base)
    module = base[layer.end() :] if layer else base
    prefix = f"blk.{layer[1]}." if layer else ""
    modules = {ours: theirs for theirs, ours in family.names.items()}
    if config.experts is not None:
        modules[f"{config.experts.block}.gate"] = "ffn_gate_inp"
        for expert_module in _EXPERT_MODULES:
            for expert in range(config.experts.count):
                modules[_expert_module(config.experts, expert_module, expert)] = expert_module
    return f"{prefix}{modules.get(module, module)}.{suffix}"


def _row_order(gguf: GgufFile, family: GgufFamily, config: ModelConfig, name: str) -> NDArray[intp] | None:
    """The order in which the rows of a tensor have to be taken; None: as they lie.

    Where llama.cpp rotates neighbouring elements of a head (2i, 2i + 1), its converter reorders the rows of q and k,
    since Hugging Face rotates elements half a head apart (i, i + head_dim / 2).
    """
    module = name.split(".")[-2]
    if not family.is_interleaved or module not in ("attn_q", "attn_k"):
        return None
    heads = config.num_heads if module == "attn_q" else config.num_kv_heads
    return np.arange(gguf.shape(name)[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
