"""Cuts a model's linear layers with DeepSpeed AutoTP, whose reductions then go through the world's own collectives.

Called by `loading`, once a rank. DeepSpeed talks to other ranks through one object, its communication backend; it is
given one that reduces over our tensor-parallel group. So no process group of torch is made, no port is opened, and
DeepSpeed's own shared-memory reduction is never compiled.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from engine.collectives.base import TensorGroup
from engine.models.errors import ModelError


def import_deepspeed() -> None:
    """Takes seconds. DeepSpeed is told that this is a CPU, also where ranks compute on GPUs: it cuts weights in
    the memory of the host, and nothing else is asked of it."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.inference.config
    import deepspeed.module_inject.auto_tp  # noqa: F401

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def cut_linears(model: Any, group: TensorGroup, tp_rank: int) -> None:
    """Replaces the model's linear layers, in place, by this rank's parts of them. What DeepSpeed leaves whole every
    rank holds whole. Raises ModelError where AutoTP does not know how to cut this model."""
    import_deepspeed()
    from deepspeed.comm import comm
    from deepspeed.inference.config import DeepSpeedInferenceConfig
    from deepspeed.module_inject import replace_transformer_layer
    from deepspeed.module_inject.auto_tp import AutoTP

    comm.cdb = _reducing_backend(group, tp_rank)
    # Parts stay views of the mapped files; the caller copies them, each once, to where they are wanted.
    config = DeepSpeedInferenceConfig(
        dtype=model.dtype, tensor_parallel={"tp_size": group.size}, keep_module_on_host=True
    )
    config.tensor_parallel.tp_group = group
    name = type(model).__name__
    try:
        for layer_class, row_parallel in AutoTP.tp_parser(model):
            config.injection_policy_tuple = row_parallel
            replace_transformer_layer(layer_class, model, None, config, model.config)
    except Exception as error:
        raise ModelError(
            f"DeepSpeed AutoTP cannot cut {name} over {group.size} ranks: {_in_a_line(error)}; --tp 1 cuts nothing"
        ) from error


def _reducing_backend(group: TensorGroup, tp_rank: int) -> Any:
    from deepspeed.comm.backend import Backend

    class GroupBackend(Backend):
        """What AutoTP's layers ask of DeepSpeed's communication, over one tensor-parallel group."""

        def __init__(self) -> None:
            super().__init__("phalanx", tp_rank, group.size)
            self.initialized = True
            self.using_mpi = False

        def get_rank(self, group: object = None) -> int:
            return tp_rank

        def get_world_size(self, group: object = None) -> int:
            return int(self.world_size)

        def inference_all_reduce(
            self, tensor: torch.Tensor, op: object = None, group: object = None
        ) -> torch.Tensor:
            return _reduce(tensor)

        def all_reduce(
            self, tensor: torch.Tensor, op: object = None, group: object = None, async_op: bool = False
        ) -> torch.Tensor:
            return _reduce(tensor)

    def _reduce(tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, taken in float32, in place of `tensor`."""
        total = group.reduced(tensor.contiguous())
        if total.data_ptr() != tensor.data_ptr():
            tensor.copy_(total)
        return tensor

    return GroupBackend()


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or repr(error)
