"""The families that llama.cpp has an architecture for: what each calls its tensors, and what its metadata come to as
config.json.

Called by the importer. What is undone here was done by llama.cpp's converter, and what a file leaves out is what
llama.cpp takes for it; who is in doubt reads `conversion/` and `src/models/` there. Imports numpy and gguf only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from engine.models.errors import ModelError
from engine.models.gguf_file import GgufFile
from engine.models.gguf_rope import rope_settings

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


_MOST_LAYERS = _MOST_HEADS = _MOST_EXPERTS = 4096
_LONGEST = 2**31 - 1


@dataclass(frozen=True)
class GgufFamily:
    """One architecture of llama.cpp, and what it is in Hugging Face's terms."""

    architecture: str
    """As config.json names it."""
    model_type: str
    names: dict[str, str] = field(default_factory=lambda: _NAMES)
    """Modules in GGUF: in Hugging Face's files, those of a layer without `model.layers.N.`."""
    is_interleaved: bool = False
    """Rows of query and key projections are in the order of a rotation that turns neighbours (2i, 2i + 1)."""
    norm_offset: float = 0.0
    """What the converter added to the weights of all norms."""
    partial_rotary: bool = False
    more: Callable[[GgufFile, str, dict[str, Any]], dict[str, Any]] = lambda gguf, name, config: {}
    """The keys of config.json that this family has beyond what all have: given the file, the architecture's name
    in it, and what all have."""


def _has(gguf: GgufFile, module: str) -> bool:
    return f"blk.0.{module}" in gguf.tensors


def _llama(gguf: GgufFile, name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"attention_bias": _has(gguf, "attn_q.bias"), "mlp_bias": _has(gguf, "ffn_gate.bias")}


def _mixtral(gguf: GgufFile, name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_local_experts": gguf.size(f"{name}.expert_count", at_most=_MOST_EXPERTS),
        "num_experts_per_tok": gguf.get(f"{name}.expert_used_count", int),
        "sliding_window": None,
    }


def _granite(gguf: GgufFile, name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {
        **_llama(gguf, name, config),
        "embedding_multiplier": gguf.number(f"{name}.embedding_scale", 1.0),
        "residual_multiplier": gguf.number(f"{name}.residual_scale", 1.0),
        "attention_multiplier": gguf.number(f"{name}.attention.scale", config["head_dim"] ** -0.5),
        "logits_scaling": gguf.number(f"{name}.logit_scale", 1.0),
    }


def _smollm3(gguf: GgufFile, name: str, config: dict[str, Any]) -> dict[str, Any]:
    # No key says which layers don't turn: in llama.cpp it is every fourth of every model.
    layers = range(config["num_hidden_layers"])
    return {**_llama(gguf, name, config), "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in layers]}


def _qwen3(gguf: GgufFile, name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"attention_bias": _has(gguf, "attn_q.bias")}


def _qwen3_moe(gguf: GgufFile, name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {
        **_qwen3(gguf, name, config),
        "num_experts": gguf.size(f"{name}.expert_count", at_most=_MOST_EXPERTS),
        "num_experts_per_tok": gguf.get(f"{name}.expert_used_count", int),
        "moe_intermediate_size": gguf.size(f"{name}.expert_feed_forward_length"),
        # No key says so: llama.cpp normalises in every model of the architecture.
        "norm_topk_prob": True,
    }


def _olmo2(gguf: GgufFile, name: str, config: dict[str, Any]) -> dict[str, Any]:
    if gguf.get(f"{name}.attention.sliding_window", int, 0):
        raise ModelError(f"{gguf.path}: OLMo 3, with a sliding window, is not supported; OLMo 2 is")
    return {}


def _phi3(gguf: GgufFile, name: str, config: dict[str, Any]) -> dict[str, Any]:
    original = gguf.get(f"{name}.rope.scaling.original_context_length", int, 0)
    return {
        # 0 stands for none.
        "sliding_window": gguf.get(f"{name}.attention.sliding_window", int, 0) or None,
        "original_max_position_embeddings": original or config["max_position_embeddings"],
    }


def _gemma(gguf: GgufFile, name: str, config: dict[str, Any], layers_of_27b: int) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    is_27b = config["num_hidden_layers"] == layers_of_27b
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        # No key says it: llama.cpp knows the one model by its number of layers.
        "query_pre_attn_scalar": config["hidden_size"] // heads if is_27b else config["head_dim"],
    }


def _gemma2(gguf: GgufFile, name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {
        **_gemma(gguf, name, config, layers_of_27b=46),
        "sliding_window": gguf.get(f"{name}.attention.sliding_window", int, 4096),
        "attn_logit_softcapping": gguf.number(f"{name}.attn_logit_softcapping", 50.0),
        "final_logit_softcapping": gguf.number(f"{name}.final_logit_softcapping", 30.0),
    }


def _gemma3(gguf: GgufFile, name: str, config: dict[str, Any]) -> dict[str, Any]:
    window = gguf.get(f"{name}.attention.sliding_window", int, 0)
    cap = gguf.number(f"{name}.final_logit_softcapping", 0.0)
    # Layers with a window have a rotation of their own, which nothing stretches.
    local = {"rope_type": "default", "rope_theta": gguf.number(f"{name}.rope.freq_base_swa", 10000.0)}
    whole = {"rope_theta": config["rope_theta"], **(config["rope_scaling"] or {"rope_type": "default"})}
    return {
        **_gemma(gguf, name, config, layers_of_27b=62),
        "sliding_window": window or None,
        "layer_types": _layer_types(gguf, name, config["num_hidden_layers"], bool(window)),
        "final_logit_softcapping": cap or None,
        "rope_scaling": None,
        "rope_parameters": {"full_attention": whole, "sliding_attention": local},
    }


def _layer_types(gguf: GgufFile, name: str, num_layers: int, slides: bool) -> list[str]:
    """By layer. A file may list them, or say that one of N layers sees everything; of six without a word."""
    key = f"{name}.attention.sliding_window_pattern"
    listed = gguf.numbers(key)
    if listed and len(listed) != num_layers:
        if len(listed) != 1 or listed[0] < 1:
            raise ModelError(f"{gguf.path}: metadata {key} has to be one number or one for each layer")
        listed = [(layer + 1) % listed[0] != 0 for layer in range(num_layers)]
    sliding = listed or [(layer + 1) % 6 != 0 for layer in range(num_layers)]
    return ["sliding_attention" if slides and is_sliding else "full_attention" for is_sliding in sliding]


_LLAMA = GgufFamily("LlamaForCausalLM", "llama", is_interleaved=True, more=_llama)
_EXPERTS = {"ffn_gate_inp": "", "ffn_gate_exps": "", "ffn_up_exps": "", "ffn_down_exps": ""}
"""What they are called stands in `families`; see gguf_tensors."""
_MIXTRAL = replace(
    _LLAMA,
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    names={**_NAMES, **_EXPERTS},
    more=_mixtral,
)
_GEMMA_NAMES = {**_NAMES, **_POST_NORMS, "ffn_norm": "pre_feedforward_layernorm"}

GGUF_FAMILIES = {
    "llama": _LLAMA,
    "qwen2": GgufFamily("Qwen2ForCausalLM", "qwen2"),
    "qwen3": GgufFamily("Qwen3ForCausalLM", "qwen3", {**_NAMES, **_HEAD_NORMS}, more=_qwen3),
    "qwen3moe": GgufFamily(
        "Qwen3MoeForCausalLM", "qwen3_moe", {**_NAMES, **_HEAD_NORMS, **_EXPERTS}, more=_qwen3_moe
    ),
    "gemma2": GgufFamily("Gemma2ForCausalLM", "gemma2", _GEMMA_NAMES, norm_offset=1.0, more=_gemma2),
    "gemma3": GgufFamily(
        "Gemma3ForCausalLM", "gemma3_text", {**_GEMMA_NAMES, **_HEAD_NORMS}, norm_offset=1.0, more=_gemma3
    ),
    "phi3": GgufFamily(
        "Phi3ForCausalLM",
        "phi3",
        {**_NAMES, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        partial_rotary=True,
        more=_phi3,
    ),
    "granite": replace(_LLAMA, architecture="GraniteForCausalLM", model_type="granite", more=_granite),
    "olmo2": GgufFamily("Olmo2ForCausalLM", "olmo2", {**_NAMES, **_HEAD_NORMS, **_POST_NORMS}, more=_olmo2),
    "smollm3": replace(_LLAMA, architecture="SmolLM3ForCausalLM", model_type="smollm3", more=_smollm3),
}
"""By `general.architecture`. Mixtral goes by the name of llama, too: see `family_of`."""


def family_of(gguf: GgufFile) -> tuple[str, GgufFamily]:
    """The architecture's name in the file, and what it means. Raises ModelError for one that is not known."""
    name = gguf.get("general.architecture", str)
    family = GGUF_FAMILIES.get(name)
    if family is None:
        allowed = ", ".join(GGUF_FAMILIES)
        raise ModelError(
            f"{gguf.path}: architecture {name!r} is not supported; supported in GGUF are {allowed}"
        )
    num_experts = gguf.get(f"{name}.expert_count", int, 0)
    if name == "llama" and num_experts:
        return name, _MIXTRAL
    if num_experts and "ffn_gate_exps" not in family.names:
        raise ModelError(f"{gguf.path}: {name} with experts is not supported; llama and qwen3moe are")
    return name, family


def model_config(gguf: GgufFile, name: str, family: GgufFamily) -> dict[str, Any]:
    """config.json without the special tokens. Raises ModelError that names the file and the key."""
    if "token_embd.weight" not in gguf.tensors:
        raise ModelError(f"{gguf.path}: tensor token_embd.weight is missing; the model is not complete")
    hidden_size = gguf.size(f"{name}.embedding_length")
    num_heads = gguf.size(f"{name}.attention.head_count", at_most=_MOST_HEADS)
    head_dim = gguf.size(f"{name}.attention.key_length", hidden_size // num_heads)
    rotated = gguf.size(f"{name}.rope.dimension_count", head_dim)
    may_turn_less = family.partial_rotary and rotated <= head_dim
    if gguf.size(f"{name}.attention.value_length", head_dim) != head_dim or (
        rotated != head_dim and not may_turn_less
    ):
        raise ModelError(
            f"{gguf.path}: heads of {head_dim} elements of which {rotated} are rotated are not supported"
        )
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": gguf.shape("token_embd.weight")[0],
        "hidden_size": hidden_size,
        "intermediate_size": gguf.size(f"{name}.feed_forward_length"),
        "num_hidden_layers": gguf.size(f"{name}.block_count", at_most=_MOST_LAYERS),
        "num_attention_heads": num_heads,
        "num_key_value_heads": gguf.size(f"{name}.attention.head_count_kv", num_heads, _MOST_HEADS),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": gguf.number(f"{name}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": gguf.size(f"{name}.context_length", at_most=_LONGEST),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "torch_dtype": "bfloat16",
        **rope_settings(gguf, name, head_dim, rotated),
    }
    return {**config, **family.more(gguf, name, config)}
