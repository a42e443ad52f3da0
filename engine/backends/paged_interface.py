"""Our paged attention behind transformers' attention interface.

A model is told by name (`ATTENTION`) to call `_attention_function`, and each forward pass brings an object as
`phalanx_step` that says what the call means: a LayerProbe, which looks once at what every layer passes, or a
PagedStep, which computes over the paged cache. There is no state beside these objects.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from engine.execution.batch import Batch
from engine.execution.kv_cache import BLOCK_SIZE, KVCache
from engine.models.attention import HeadGroups, Scoring, paged_attention, within_window
from engine.models.errors import ModelError

ATTENTION = "phalanx_paged"
"""What transformers knows the function by. It builds no masks for a name that is unknown to it as a mask."""

STEP = "phalanx_step"
"""The keyword argument that a forward pass hands down to its layers."""

_UNDERSTOOD = {"scaling", "dropout", "sliding_window", "softcap", "is_causal"}
_WITHOUT_EFFECT = {
    "position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict",
    "position_embeddings", "output_router_logits", "head_mask", "layer_idx",
}  # fmt: skip
"""What models hand on to every kind of attention, and none of them computes with."""


@dataclass(frozen=True)
class AttentionLayer:
    """What one attention layer passes on this rank."""

    index: int
    """In the order of the calls; also its place in the cache."""
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int | None
    soft_cap: float | None

    @property
    def head_dim(self) -> int:
        """Of the cache, which holds keys and values in one width."""
        return max(self.key_dim, self.value_dim)


class StepNotHandedOn(ModelError):
    """A model's layers keep the arguments of a forward pass from its attention."""


class _Step(Protocol):
    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: object,
        options: dict[str, Any],
    ) -> torch.Tensor: ...


def register() -> None:
    """Makes the function known to transformers. May be called again."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention_function)


def _attention_function(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """query, key, value `[1, heads, num_tokens, head_dim]`; returns `[1, num_tokens, heads, head_dim]`."""
    step: _Step | None = options.pop(STEP, None)
    if step is None:
        raise StepNotHandedOn(
            f"--backend deepspeed cannot run this model: {type(module).__name__} gets no keyword arguments of the "
            "forward pass, by which paged attention learns what to compute"
        )
    return step.attend(module, query, key, value, attention_mask, options), None


def hand_on_step(model: Any) -> None:
    """For a model whose layers drop the arguments of the forward pass: its attention modules are given the step that
    its body was called with."""
    step: dict[str, Any] = {}

    def remember(_body: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        step[STEP] = options.get(STEP)

    def hand_on(_module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return args, {**step, **options}

    model.base_model.register_forward_pre_hook(remember, with_kwargs=True)
    for module in model.modules():
        parameters = inspect.signature(module.forward).parameters.values()
        takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        if "Attention" in type(module).__name__ and takes_more:
            module.register_forward_pre_hook(hand_on, with_kwargs=True)


class LayerProbe:
    """Attends over one sequence without a cache, and keeps what each layer passed. Raises ModelError for what paged
    attention would compute otherwise."""

    def __init__(self) -> None:
        self.layers: dict[int, AttentionLayer] = {}
        """By the identity of the module that called."""

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: object,
        options: dict[str, Any],
    ) -> torch.Tensor:
        name = type(module).__name__
        unknown = sorted(
            option
            for option, given in options.items()
            if given is not None and option not in _UNDERSTOOD | _WITHOUT_EFFECT
        )
        if unknown:
            raise _refusal(name, f"it takes {', '.join(unknown)}, which paged attention does not compute")
        if mask is not None:
            raise _refusal(name, "it adds a mask of its own to the scores")
        if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            raise _refusal(name, "it looks at later tokens, too")
        if id(module) in self.layers:
            raise _refusal(name, "it attends more than once in a pass")
        if query.shape[2] != key.shape[2] or query.shape[1] % key.shape[1] or query.shape[0] != 1:
            raise _refusal(
                name, f"queries of shape {list(query.shape)} do not go with keys {list(key.shape)}"
            )
        scaling = options.get("scaling")
        layer = AttentionLayer(
            index=len(self.layers),
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            key_dim=key.shape[3],
            value_dim=value.shape[3],
            scale=key.shape[3] ** -0.5 if scaling is None else float(scaling),
            window=options.get("sliding_window"),
            soft_cap=options.get("softcap"),
        )
        self.layers[id(module)] = layer
        repeats = layer.num_heads // layer.num_kv_heads
        out = F.scaled_dot_product_attention(
            query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1),
            is_causal=True, scale=layer.scale,
        )  # fmt: skip
        return out.transpose(1, 2)


class PagedLayers:
    """The attention layers of one rank, as a probe found them, and what they share between steps."""

    def __init__(self, layers: dict[int, AttentionLayer], device: torch.device) -> None:
        self.by_module = layers
        self.windows = list(dict.fromkeys(layer.window for layer in layers.values()))
        self._device = device
        shapes = {(layer.num_heads, layer.num_kv_heads) for layer in layers.values()}
        self.heads = {
            (heads, kv_heads): HeadGroups(tuple(head // (heads // kv_heads) for head in range(heads)), device)
            for heads, kv_heads in shapes
        }

    @property
    def elements_per_block(self) -> int:
        """Numbers that one block holds on this rank, over all layers."""
        return sum(2 * BLOCK_SIZE * layer.num_kv_heads * layer.head_dim for layer in self.by_module.values())

    def new_cache(self, num_blocks: int, dtype: torch.dtype) -> KVCache:
        """A cache whose layers may differ in shape."""
        whole = KVCache(range(0), num_blocks, 1, 1, dtype, self._device)
        for layer in self.by_module.values():
            index = range(layer.index, layer.index + 1)
            part = KVCache(index, num_blocks, layer.num_kv_heads, layer.head_dim, dtype, self._device)
            whole.keys.update(part.keys)
            whole.values.update(part.values)
        return whole


class PagedStep:
    """One step of the world: attends over the paged cache as the batch says."""

    def __init__(self, layers: PagedLayers, batch: Batch, cache: KVCache) -> None:
        self._layers = layers
        self._cache = cache
        self._views = {window: within_window(batch, window) for window in layers.windows}

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: object,
        options: dict[str, Any],
    ) -> torch.Tensor:
        layer = self._layers.by_module[id(module)]
        keys, values = self._cache.keys[layer.index], self._cache.values[layer.index]
        out = paged_attention(
            _flat(query, layer.head_dim, keys.dtype),
            _flat(key, layer.head_dim, keys.dtype),
            _flat(value, layer.head_dim, keys.dtype),
            keys,
            values,
            self._layers.heads[layer.num_heads, layer.num_kv_heads],
            Scoring(layer.scale, layer.soft_cap),
            self._views[layer.window],
        )
        if layer.value_dim != layer.head_dim:
            out = out[..., : layer.value_dim]
        return out.to(query.dtype).unsqueeze(0)


def _flat(x: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """`[1, heads, num_tokens, dim]` to `[num_tokens, heads, head_dim]`; zeros fill what is missing of a head."""
    x = x[0].transpose(0, 1).to(dtype)
    if x.shape[-1] != head_dim:
        x = F.pad(x, (0, head_dim - x.shape[-1]))
    return x.contiguous()


def _refusal(module: str, reason: str) -> ModelError:
    return ModelError(f"--backend deepspeed cannot run this model: of its attention {module}, {reason}")
