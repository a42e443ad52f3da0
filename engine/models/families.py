"""What the name of an architecture says that its config.json does not: one line of data for each family.

Called by `config`, which puts the two together; nothing else asks for an architecture's name. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from engine.models.config_keys import Keys


class Norms(Enum):
    """Where a layer normalises: what goes into attention and MLP, what comes out of them, or both."""

    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"


class QueryKeyNorm(Enum):
    """Over what queries and keys are normalised before they are turned."""

    NONE = "none"
    HEAD = "head"
    PROJECTION = "projection"
    """All heads of a token together, also those of other ranks."""


class AttentionBias(Enum):
    """Which projections of attention have a bias."""

    NEVER = "never"
    QKV = "qkv"
    BY_FILE = "by file"
    """`attention_bias` says whether all four of them have one."""


@dataclass(frozen=True)
class ExpertNames:
    """How the files name the parts of a mixture of experts."""

    count: tuple[str, ...]
    """The keys of config.json that may say how many there are; transformers 5 writes another than older ones."""
    columns: str
    """The key that says how many columns the MLP of each has."""
    block: str
    """The module that holds router and experts."""
    projections: tuple[str, str, str]
    """Gate, up and down."""
    always_normalized: bool = False
    """The weights of a token's experts are scaled to a sum of 1, whatever `norm_topk_prob` says."""


@dataclass(frozen=True)
class Family:
    """What models of one architecture have in common."""

    attention_bias: AttentionBias = AttentionBias.NEVER
    mlp_bias: bool = False
    """`mlp_bias` says whether gate, up and down have one."""
    norms: Norms = Norms.BEFORE
    query_key_norm: QueryKeyNorm = QueryKeyNorm.NONE
    norm_offset: float = 0.0
    """Is added to the weights of all norms."""
    activation: tuple[str, str] = ("hidden_act", "silu")
    """The key that names it, and what a missing key means."""
    tied: bool = False
    """What a missing `tie_word_embeddings` means."""
    fused_projections: bool = False
    """The files hold q, k and v as one tensor, and gate and up."""
    rope_theta: float = 10000.0
    """What a missing `rope_theta` means."""
    partial_rotary: bool = False
    """`partial_rotary_factor` may lie below 1."""
    has_local_rope: bool = False
    """Layers with a window have a rotary embedding of their own."""
    has_unturned_layers: bool = False
    """`no_rope_layers` and `no_rope_layer_interval` say which layers have no rotary embedding."""
    sliding: Callable[[Keys, int], list[bool]] | None = None
    """Given the number of layers, which of them have the window that `sliding_window` says, if `layer_types`
    does not say it; None: no layer ever has one."""
    window: int | None = None
    """What a missing `sliding_window` means."""
    window_switch: bool = False
    """`sliding_window` counts only where `use_sliding_window` is true."""
    layer_types: bool = True
    """`layer_types` is heeded."""
    scaled_embedding: bool = False
    """Embeddings are multiplied with the square root of the hidden size."""
    query_scalar: bool = False
    """`query_pre_attn_scalar` stands for the head size in the scale of attention."""
    soft_caps: tuple[float | None, float | None] | None = None
    """What missing `attn_logit_softcapping` and `final_logit_softcapping` mean; None: they are not heeded."""
    multipliers: bool = False
    """`embedding_multiplier`, `residual_multiplier`, `attention_multiplier` and `logits_scaling` are heeded."""
    experts: ExpertNames | None = None


def _every_layer(keys: Keys, num_layers: int) -> list[bool]:
    return [True] * num_layers


def _upper_layers(keys: Keys, num_layers: int) -> list[bool]:
    first = keys.integer("max_window_layers", 28, minimum=0)
    return [layer >= first for layer in range(num_layers)]


def _unturned_layers(keys: Keys, num_layers: int) -> list[bool]:
    return [not turns for turns in turned_layers(keys, num_layers)]


def _every_second_layer(keys: Keys, num_layers: int) -> list[bool]:
    return [layer % 2 == 0 for layer in range(num_layers)]


def _all_but_one_in(keys: Keys, num_layers: int) -> list[bool]:
    pattern = keys.integer("sliding_window_pattern", 6)
    return [(layer + 1) % pattern != 0 for layer in range(num_layers)]


def turned_layers(keys: Keys, num_layers: int) -> list[bool]:
    """Which layers of a family with `has_unturned_layers` have a rotary embedding."""
    listed = keys.choices("no_rope_layers", (0, 1), num_layers)
    if listed is not None:
        return [bool(turns) for turns in listed]
    interval = keys.integer("no_rope_layer_interval", 4)
    return [(layer + 1) % interval != 0 for layer in range(num_layers)]


_MISTRAL = Family(sliding=_every_layer, window=4096, layer_types=False)
_QWEN3 = Family(attention_bias=AttentionBias.BY_FILE, query_key_norm=QueryKeyNorm.HEAD, window_switch=True)
_GEMMA = Family(
    attention_bias=AttentionBias.BY_FILE,
    norms=Norms.AROUND,
    norm_offset=1.0,
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    tied=True,
    window=4096,
    scaled_embedding=True,
    query_scalar=True,
    soft_caps=(None, None),
)

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(attention_bias=AttentionBias.BY_FILE, mlp_bias=True),
    "MistralForCausalLM": _MISTRAL,
    "MixtralForCausalLM": replace(
        _MISTRAL,
        window=None,
        rope_theta=1e6,
        experts=ExpertNames(
            ("num_local_experts",), "intermediate_size", "block_sparse_moe", ("w1", "w3", "w2"), True
        ),
    ),
    "Qwen2ForCausalLM": Family(attention_bias=AttentionBias.QKV, sliding=_upper_layers, window_switch=True),
    "Qwen3ForCausalLM": replace(_QWEN3, sliding=_upper_layers),
    "Qwen3MoeForCausalLM": replace(
        _QWEN3,
        sliding=_every_layer,
        layer_types=False,
        experts=ExpertNames(
            ("num_experts", "num_local_experts"),
            "moe_intermediate_size",
            "mlp",
            ("gate_proj", "up_proj", "down_proj"),
        ),
    ),
    "SmolLM3ForCausalLM": Family(
        attention_bias=AttentionBias.BY_FILE,
        mlp_bias=True,
        tied=True,
        rope_theta=2e6,
        has_unturned_layers=True,
        sliding=_unturned_layers,
        window_switch=True,
    ),
    "GraniteForCausalLM": Family(attention_bias=AttentionBias.BY_FILE, mlp_bias=True, multipliers=True),
    "Phi3ForCausalLM": Family(
        fused_projections=True, partial_rotary=True, sliding=_every_layer, layer_types=False
    ),
    "Olmo2ForCausalLM": Family(
        attention_bias=AttentionBias.BY_FILE, norms=Norms.AFTER, query_key_norm=QueryKeyNorm.PROJECTION
    ),
    "Gemma2ForCausalLM": replace(_GEMMA, sliding=_every_second_layer, soft_caps=(50.0, 30.0)),
    "Gemma3ForCausalLM": replace(
        _GEMMA,
        query_key_norm=QueryKeyNorm.HEAD,
        rope_theta=1e6,
        has_local_rope=True,
        sliding=_all_but_one_in,
    ),
}
"""By the names that stand under `architectures` in config.json."""
