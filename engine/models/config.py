"""What a model is: its sizes, its rotary embedding and its special tokens, read from a Hugging Face folder.

Called by `prepare` before a world starts and by every rank. Imports no torch. It never guesses: whatever it
does not know how to compute exactly is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from engine.models.config_keys import Keys, read_keys
from engine.models.errors import ModelError
from engine.models.families import FAMILIES, AttentionBias, Family, Norms, QueryKeyNorm, turned_layers
from engine.models.rope_config import RopeConfig, read_rope

SUPPORTED_ARCHITECTURES = tuple(FAMILIES)
"""Names as they stand under `architectures` in config.json."""

SUPPORTED_DTYPES = ("float32", "bfloat16")
"""What a world computes in; `--dtype auto` is the dtype of the config."""


class Activation(Enum):
    """What the gate of an MLP goes through."""

    SILU = "silu"
    GELU_TANH = "gelu_pytorch_tanh"
    """GELU in its approximation by tanh (arXiv 1606.08415)."""


@dataclass(frozen=True)
class ExpertConfig:
    """A mixture of experts in place of each MLP."""

    count: int
    per_token: int
    """How many of them each token is routed to."""
    normalized: bool
    """The weights of a token's experts are scaled to a sum of 1."""
    block: str
    """The module that holds router and experts in the model's files."""
    projections: tuple[str, str, str]
    """What the files call gate, up and down."""


@dataclass(frozen=True)
class ModelConfig:
    """The facts about a decoder. Sizes are those of the whole model, before any cut.

    What most models leave as it is has a default: that of the Llama family.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Columns of the MLP; with experts, of each of them."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    """Of every layer that `ropes` does not name."""
    tie_word_embeddings: bool
    attention_bias: bool
    """Query, key and value projections have a bias."""
    attention_output_bias: bool
    mlp_bias: bool
    """Gate, up and down projections have a bias."""
    max_model_len: int
    """Tokens of prompt and output together that the model is made for."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """Every token that ends a sequence: those of generation_config.json, then those of config.json."""
    dtype: str = "bfloat16"
    """What `--dtype auto` means for this model."""

    ropes: tuple[RopeConfig | None, ...] = ()
    """By layer, where layers differ; None is a layer that turns nothing. Empty: `rope` everywhere."""
    windows: tuple[int | None, ...] = ()
    """By layer, how many tokens back one can look, itself counted; None is all of them. Empty: all everywhere."""
    norms: Norms = Norms.BEFORE
    norm_offset: float = 0.0
    """Is added to the weights of all norms."""
    query_key_norm: QueryKeyNorm = QueryKeyNorm.NONE
    activation: Activation = Activation.SILU
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    """What attention and MLP add to the residual stream is multiplied with it."""
    attention_scale: float | None = None
    """Products of queries and keys are multiplied with it; None: 1 / sqrt(head_dim)."""
    attention_soft_cap: float | None = None
    """Those products become cap * tanh(x / cap); so do the logits with `logit_soft_cap`."""
    logit_divisor: float = 1.0
    logit_soft_cap: float | None = None
    fused_projections: bool = False
    """The files hold q, k and v as one tensor, and gate and up."""
    experts: ExpertConfig | None = None

    @classmethod
    def from_folder(cls, path: Path) -> ModelConfig:
        """Reads config.json and, where there is one, generation_config.json.

        Raises ModelError with the file, the key and the remedy.
        """
        file = path / "config.json"
        if not file.is_file():
            raise ModelError(f"{path} is not a model folder: it has no config.json")
        keys = read_keys(file)
        architecture = _architecture(keys)
        family = FAMILIES[architecture]
        _refuse_what_is_not_computed(keys)

        hidden_size = keys.integer("hidden_size")
        num_layers = keys.integer("num_hidden_layers")
        num_heads = keys.integer("num_attention_heads")
        num_kv_heads = keys.integer("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise ModelError(
                f"{file}: num_attention_heads {num_heads} is not a multiple of "
                f"num_key_value_heads {num_kv_heads}"
            )
        head_dim = _head_dim(keys, hidden_size, num_heads)
        has_bias = family.attention_bias is AttentionBias.BY_FILE and keys.boolean("attention_bias", False)
        windows = _windows(keys, family, num_layers)
        max_position = keys.integer("max_position_embeddings", 2048)
        rope, ropes = _ropes(keys, family, num_layers, windows, max_position, head_dim)
        vocab_size = keys.integer("vocab_size")
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=keys.integer(family.experts.columns if family.experts else "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
            rope=rope,
            tie_word_embeddings=keys.boolean("tie_word_embeddings", family.tied),
            attention_bias=has_bias or family.attention_bias is AttentionBias.QKV,
            attention_output_bias=has_bias,
            mlp_bias=family.mlp_bias and keys.boolean("mlp_bias", False),
            max_model_len=_max_model_len(max_position, rope),
            bos_token_id=next(iter(keys.token_ids("bos_token_id", vocab_size)), None),
            eos_token_ids=eos_token_ids(path, keys, vocab_size),
            ropes=ropes,
            windows=windows,
            norms=family.norms,
            norm_offset=family.norm_offset,
            query_key_norm=family.query_key_norm,
            activation=_activation(keys, family),
            fused_projections=family.fused_projections,
            experts=_experts(keys, family),
            **_scales(keys, family, hidden_size),
        )

    def resolve_dtype(self, flag: str) -> str:
        """The dtype that `--dtype FLAG` means. Raises ModelError for a name that is not allowed."""
        if flag == "auto":
            return self.dtype
        if flag not in SUPPORTED_DTYPES:
            raise ModelError(
                f"--dtype {flag} is not supported; allowed are auto, {', '.join(SUPPORTED_DTYPES)}"
            )
        return flag

    def rope_of(self, layer: int) -> RopeConfig | None:
        """The rotary embedding of a layer; None: it has none."""
        return self.ropes[layer] if self.ropes else self.rope

    def window_of(self, layer: int) -> int | None:
        """How many tokens back a layer can look, the token itself counted; None: all."""
        return self.windows[layer] if self.windows else None


def _architecture(keys: Keys) -> str:
    names = keys.data.get("architectures")
    allowed = ", ".join(SUPPORTED_ARCHITECTURES)
    if not isinstance(names, list) or not names:
        raise ModelError(f"{keys.file}: architectures is missing; supported are {allowed}")
    for name in names:
        if name in SUPPORTED_ARCHITECTURES:
            return str(name)
    hint = ""
    if str(names[0]).endswith(("ForCausalLM", "LMHeadModel")):
        hint = "; --backend deepspeed may run it (pip install 'phalanx-serve[deepspeed]')"
    raise ModelError(f"{keys.file}: architecture {names[0]} is not supported; supported are {allowed}{hint}")


def _refuse_what_is_not_computed(keys: Keys) -> None:
    if keys.data.get("quantization_config"):
        raise ModelError(
            f"{keys.file}: quantization_config is set, and quantized weights are not supported; "
            "take the model's unquantized weights"
        )
    if keys.data.get("use_bidirectional_attention"):
        raise ModelError(
            f"{keys.file}: use_bidirectional_attention is set; such a model encodes text and generates none"
        )


def _head_dim(keys: Keys, hidden_size: int, num_heads: int) -> int:
    if keys.data.get("head_dim") is None and hidden_size % num_heads:
        raise ModelError(
            f"{keys.file}: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, "
            "and head_dim is missing"
        )
    head_dim = keys.integer("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise ModelError(f"{keys.file}: head_dim {head_dim} is odd; a rotary embedding needs an even one")
    return head_dim


def _activation(keys: Keys, family: Family) -> Activation:
    key, default = family.activation
    name = keys.data.get(key) or default
    name = {"swish": "silu"}.get(name, name)
    allowed = [activation.value for activation in Activation]
    if name not in allowed:
        raise ModelError(f"{keys.file}: {key} {name!r} is not supported; supported are {', '.join(allowed)}")
    return Activation(name)


def _windows(keys: Keys, family: Family, num_layers: int) -> tuple[int | None, ...]:
    if family.sliding is None or keys.data.get("sliding_window", family.window) is None:
        return ()
    if family.window_switch and not keys.boolean("use_sliding_window", False):
        return ()
    window = keys.integer("sliding_window", family.window)
    types = None
    if family.layer_types:
        types = keys.choices("layer_types", ("full_attention", "sliding_attention"), num_layers)
    if types is None:
        slides = family.sliding(keys, num_layers)
    else:
        slides = [kind == "sliding_attention" for kind in types]
    return tuple(window if sliding else None for sliding in slides) if any(slides) else ()


def _ropes(
    keys: Keys,
    family: Family,
    num_layers: int,
    windows: tuple[int | None, ...],
    max_position: int,
    head_dim: int,
) -> tuple[RopeConfig, tuple[RopeConfig | None, ...]]:
    """The model's rotary embedding, and those of its layers where they differ."""
    # `rope_parameters` is what transformers 5 writes, with theta inside; `rope_scaling` beside a
    # `rope_theta` is the older form, and wins in transformers where both are there.
    raw = keys.data.get("rope_scaling") or keys.data.get("rope_parameters") or {}
    local: Any = {}
    if family.has_local_rope and isinstance(raw, dict) and "full_attention" in raw:
        raw, local = raw["full_attention"], raw.get("sliding_attention") or {}
    for part in (raw, local):
        if not isinstance(part, dict) or any(isinstance(value, dict) for value in part.values()):
            raise ModelError(
                f"{keys.file}: rope_parameters has to be one flat object"
                + (" or one each for full_attention and sliding_attention" if family.has_local_rope else "")
            )
    rope = read_rope(keys, raw, max_position, head_dim, family.rope_theta, family.partial_rotary)
    if family.has_local_rope and windows:
        theta = keys.number("rope_local_base_freq", 10000.0)
        local_rope = read_rope(
            Keys(keys.file, {}), local, max_position, head_dim, default_theta=theta, partial=False
        )
        return rope, tuple(rope if window is None else local_rope for window in windows)
    if family.has_unturned_layers:
        turned = turned_layers(keys, num_layers)
        return rope, () if all(turned) else tuple(rope if turns else None for turns in turned)
    return rope, ()


def _experts(keys: Keys, family: Family) -> ExpertConfig | None:
    names = family.experts
    if names is None:
        return None
    if keys.data.get("mlp_only_layers") or keys.integer("decoder_sparse_step", 1) != 1:
        raise ModelError(
            f"{keys.file}: mlp_only_layers or decoder_sparse_step gives some layers no experts; "
            "supported are models that have them in every layer"
        )
    count_key = next((key for key in names.count if key in keys.data), names.count[0])
    count, per_token = keys.integer(count_key), keys.integer("num_experts_per_tok")
    if per_token > count:
        raise ModelError(f"{keys.file}: num_experts_per_tok {per_token} is above {count_key} {count}")
    normalized = names.always_normalized or keys.boolean("norm_topk_prob", False)
    return ExpertConfig(count, per_token, normalized, names.block, names.projections)


def _scales(keys: Keys, family: Family, hidden_size: int) -> dict[str, Any]:
    """The fields of ModelConfig that scale or cap something."""
    scales: dict[str, Any] = {}
    if family.multipliers:
        scales["embedding_multiplier"] = keys.number("embedding_multiplier", 1.0)
        scales["residual_multiplier"] = keys.number("residual_multiplier", 1.0)
        scales["attention_scale"] = keys.number("attention_multiplier", 1.0)
        scales["logit_divisor"] = keys.number("logits_scaling", 1.0)
    if family.scaled_embedding:
        scales["embedding_multiplier"] = hidden_size**0.5
    if family.query_scalar:
        scales["attention_scale"] = keys.number("query_pre_attn_scalar", 256) ** -0.5
    if family.soft_caps is not None:
        attention, logits = family.soft_caps
        scales["attention_soft_cap"] = keys.optional_number("attn_logit_softcapping", attention)
        scales["logit_soft_cap"] = keys.optional_number("final_logit_softcapping", logits)
    return scales


def _max_model_len(max_position: int, rope: RopeConfig) -> int:
    if rope.scaling == "yarn":
        # Files that switch YaRN on by hand leave max_position_embeddings at the original length.
        return max(max_position, int(rope.original_max_position * rope.factor))
    if rope.scaling == "longrope":
        return min(max_position, rope.original_max_position)
    return max_position


def eos_token_ids(path: Path, keys: Keys, vocab_size: int) -> tuple[int, ...]:
    """Every token that ends a sequence: those of generation_config.json, then those of config.json."""
    ids: list[int] = []
    generation = path / "generation_config.json"
    if generation.is_file():
        ids += read_keys(generation).token_ids("eos_token_id", vocab_size)
    ids += keys.token_ids("eos_token_id", vocab_size)
    return tuple(dict.fromkeys(ids))
