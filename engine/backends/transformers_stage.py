"""A stage that a model of transformers computes: what `engine.models.decoder` is for our own decoder.

Made by `loading`, called by the stage runner. The tokens of a step go through the model as one row of a batch, with
their positions; which of them belong to one sequence only attention knows.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from engine.backends.paged_interface import STEP, LayerProbe, PagedLayers, PagedStep
from engine.execution.batch import Batch
from engine.execution.kv_cache import KVCache
from engine.models.errors import ModelError


class TransformersStage:
    """All layers of a model, as cut for one tensor-parallel rank. Every rank computes whole logits."""

    def __init__(self, model: Any, layers: PagedLayers, gives_logits: bool) -> None:
        self.device: torch.device = model.device
        self._model = model
        self._head = _without_body(model)
        self._layers = layers
        self._gives_logits = gives_logits

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Nothing: the model looks its tokens up itself, in `layers`."""
        return torch.empty(len(token_ids), 0, device=self.device)

    def layers(self, hidden: torch.Tensor, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Hidden states `[num_tokens, hidden_size]` float32 after the last layer and its norm."""
        return body_forward(
            self._model, batch.token_ids, batch.positions, PagedStep(self._layers, batch, cache)
        )

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Nothing is left to do: the model's body ends with its norm."""
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[num_rows, hidden_size]` to `[num_rows, vocab_size]` float32 at the first rank. The others take part in
        the sums of it and return no columns."""
        dtype = self._model.dtype
        logits = self._head(inputs_embeds=hidden.to(dtype).unsqueeze(0), use_cache=False).logits[0].float()
        return logits if self._gives_logits else logits[:, :0]


def body_forward(
    model: Any, token_ids: torch.Tensor, positions: torch.Tensor, step: PagedStep | LayerProbe
) -> torch.Tensor:
    """The model without its head over a flat row of tokens: `[num_tokens, hidden_size]` float32."""
    output = model.base_model(
        input_ids=token_ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, **{STEP: step}
    )
    return output.last_hidden_state[0].float()


def _without_body(model: Any) -> Any:
    """The model's own head, with all that it does to logits: a shallow copy, in which hidden states that are given
    stand for those that the layers compute."""
    prefix = model.base_model_prefix
    if prefix not in model._modules:
        raise ModelError(
            f"--backend deepspeed cannot run {type(model).__name__}: its layers are no part called {prefix!r} "
            "that could be told from its head"
        )
    head = copy.copy(model)
    head._modules = {**model._modules, prefix: _GivenHiddenStates()}
    return head


class _GivenHiddenStates(torch.nn.Module):
    """Stands for a model's layers and returns the hidden states that it is given as embeddings."""

    @property
    def decoder(self) -> _GivenHiddenStates:
        """OPT's head calls the decoder inside its body."""
        return self

    def forward(self, *_unused: Any, inputs_embeds: torch.Tensor, **_ignored: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        output = MoeModelOutputWithPast(last_hidden_state=inputs_embeds)
        output.cross_attentions = None  # what heads of models that may have an encoder hand on
        return output
