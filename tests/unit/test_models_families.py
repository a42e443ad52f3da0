"""What each family's published config.json comes to, and what of it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.models.config import Activation, ModelConfig
from engine.models.errors import ModelError
from engine.models.families import Norms, QueryKeyNorm

SIZES: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 32768,
}
# The keys of published files that matter here: what they set beside SIZES.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
    "Mistral-7B-v0.3": {
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32768,
    },
    "Qwen2.5-7B": {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "SmolLM3-3B": {
        "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 65536,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "no_rope_layer_interval": 4,
        "layer_types": ["full_attention"] * 36,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 128256,
    },
    "granite-3.1-2b": {
        "architectures": ["GraniteForCausalLM"],
        "attention_bias": False,
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "logits_scaling": 8.0,
        "mlp_bias": False,
        "num_hidden_layers": 40,
        "max_position_embeddings": 131072,
        "residual_multiplier": 0.22,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "tie_word_embeddings": True,
        "vocab_size": 49155,
    },
    "Phi-3-mini-4k": {
        "architectures": ["Phi3ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rope_scaling": None,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
        "vocab_size": 32064,
    },
    "Phi-4-mini": {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [8.0] * 48},
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "vocab_size": 200064,
    },
    "OLMo-2-1124-7B": {
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "intermediate_size": 11008,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "vocab_size": 100352,
    },
    "gemma-2-27b": {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 128,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_hidden_layers": 46,
        "num_key_value_heads": 16,
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 144,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "gemma-3-1b": {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
    "Mixtral-8x7B": {
        "architectures": ["MixtralForCausalLM"],
        "hidden_act": "silu",
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "vocab_size": 151936,
    },
}


def read(folder: Path, model: str, **changes: Any) -> ModelConfig:
    """The config of a published model with some keys changed; a key set to `...` is left out."""
    data = {key: value for key, value in {**SIZES, **PUBLISHED[model], **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(data))
    return ModelConfig.from_folder(folder)


def test_mistral(tmp_path: Path) -> None:
    first = read(tmp_path, "Mistral-7B-v0.1")
    assert first.windows == (4096,) * 32
    assert first.max_model_len == 32768, "a window does not bound the length"
    assert read(tmp_path, "Mistral-7B-v0.1", sliding_window=...).windows == (4096,) * 32
    assert read(tmp_path, "Mistral-7B-v0.3").windows == ()


def test_qwen_2(tmp_path: Path) -> None:
    config = read(tmp_path, "Qwen2.5-7B")
    assert (config.attention_bias, config.attention_output_bias, config.mlp_bias) == (True, False, False)
    assert config.windows == ()
    slides = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 26}
    assert read(tmp_path, "Qwen2.5-7B", **slides).windows == (None,) * 26 + (4096,) * 2
    types = ["sliding_attention", "full_attention"] * 14
    assert read(tmp_path, "Qwen2.5-7B", **slides, layer_types=types).windows == (4096, None) * 14


def test_qwen_3(tmp_path: Path) -> None:
    config = read(tmp_path, "Qwen3-0.6B")
    assert config.query_key_norm is QueryKeyNorm.HEAD
    assert (config.num_heads * config.head_dim, config.hidden_size) == (2048, 1024)
    assert not config.attention_bias
    assert config.tie_word_embeddings
    assert (config.windows, config.ropes, config.norms) == ((), (), Norms.BEFORE)


def test_smollm_3(tmp_path: Path) -> None:
    config = read(tmp_path, "SmolLM3-3B")
    assert config.ropes == (config.rope, config.rope, config.rope, None) * 9
    assert config.rope.theta == 5000000.0
    assert config.tie_word_embeddings, "a missing key means a tied head"
    assert read(tmp_path, "SmolLM3-3B", no_rope_layers=...) == config
    assert config.rope_of(2) == config.rope
    assert config.rope_of(3) is None


def test_granite(tmp_path: Path) -> None:
    config = read(tmp_path, "granite-3.1-2b")
    assert (config.embedding_multiplier, config.residual_multiplier) == (12.0, 0.22)
    assert (config.attention_scale, config.logit_divisor) == (0.015625, 8.0)


def test_phi_3_and_4(tmp_path: Path) -> None:
    config = read(tmp_path, "Phi-3-mini-4k")
    assert config.fused_projections
    assert config.windows == (2047,) * 32
    assert config.rope.rotary_dim(config.head_dim) == config.head_dim == 96
    config = read(tmp_path, "Phi-4-mini")
    assert (config.head_dim, config.rope.rotary_dim(config.head_dim)) == (128, 96)
    assert config.rope.scaling == "longrope"
    assert config.rope.attention_factor == pytest.approx(1.1902380714238083)
    assert config.rope.wavelength_factors == (1.0,) * 48
    assert config.max_model_len == 4096, "its keys would have to be turned anew beyond"


def test_olmo_2(tmp_path: Path) -> None:
    config = read(tmp_path, "OLMo-2-1124-7B")
    assert config.norms is Norms.AFTER
    assert config.query_key_norm is QueryKeyNorm.PROJECTION


def test_gemma_2(tmp_path: Path) -> None:
    config = read(tmp_path, "gemma-2-27b")
    assert config.norms is Norms.AROUND
    assert config.norm_offset == 1.0
    assert config.activation is Activation.GELU_TANH
    assert config.embedding_multiplier == 4608**0.5
    assert config.attention_scale == 1 / 12
    assert (config.attention_soft_cap, config.logit_soft_cap) == (50.0, 30.0)
    assert config.windows == (4096, None) * 23
    assert config.ropes == ()
    assert config.tie_word_embeddings
    assert read(tmp_path, "gemma-2-27b", attn_logit_softcapping=...).attention_soft_cap == 50.0
    assert read(tmp_path, "gemma-2-27b", attn_logit_softcapping=None).attention_soft_cap is None


def test_gemma_3(tmp_path: Path) -> None:
    config = read(tmp_path, "gemma-3-1b")
    assert config.query_key_norm is QueryKeyNorm.HEAD
    assert (config.attention_soft_cap, config.logit_soft_cap) == (None, None)
    assert config.windows == (*((512,) * 5 + (None,)) * 4, 512, 512)
    assert [rope.theta for rope in config.ropes if rope is not None] == [*([1e4] * 5 + [1e6]) * 4, 1e4, 1e4]
    types = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(26)]
    parameters = {
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    newer = {"rope_local_base_freq": ..., "rope_scaling": ..., "rope_theta": ..., "layer_types": types}
    assert read(tmp_path, "gemma-3-1b", **newer, rope_parameters=parameters) == config
    # The larger ones stretch the rotary embedding of their whole layers only.
    stretched = read(tmp_path, "gemma-3-1b", rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert stretched.rope_of(5) == stretched.rope != config.rope
    assert stretched.rope_of(4) == config.rope_of(4)


def test_mixtral(tmp_path: Path) -> None:
    experts = read(tmp_path, "Mixtral-8x7B").experts
    assert experts is not None
    assert (experts.count, experts.per_token, experts.normalized) == (8, 2, True)


def test_qwen_3_moe(tmp_path: Path) -> None:
    config = read(tmp_path, "Qwen3-30B-A3B")
    assert config.experts is not None
    assert (config.experts.count, config.experts.per_token, config.experts.normalized) == (128, 8, True)
    assert config.intermediate_size == 768
    assert config.query_key_norm is QueryKeyNorm.HEAD
    assert read(tmp_path, "Qwen3-30B-A3B", num_experts=..., num_local_experts=128) == config


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        ("gemma-3-1b", {"architectures": ["Gemma3ForConditionalGeneration"]}, ["Gemma3ForConditionalGen"]),
        ("gemma-3-1b", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ("gemma-3-1b", {"hidden_activation": "gelu"}, ["hidden_activation 'gelu'", "gelu_pytorch_tanh"]),
        ("gemma-3-1b", {"layer_types": ["full_attention"]}, ["layer_types", "26"]),
        ("gemma-3-1b", {"layer_types": ["chunked_attention"] * 26}, ["layer_types", "chunked_attention"]),
        ("gemma-3-1b", {"rope_scaling": {"full_attention": {"rope_type": "x"}}}, ["rope_type 'x'"]),
        ("gemma-2-27b", {"query_pre_attn_scalar": 0}, ["query_pre_attn_scalar"]),
        ("gemma-2-27b", {"rope_scaling": {"full_attention": {}}}, ["rope_parameters", "flat"]),
        ("SmolLM3-3B", {"no_rope_layers": [1, 0]}, ["no_rope_layers", "36"]),
        ("SmolLM3-3B", {"no_rope_layers": [2] * 36}, ["no_rope_layers", "2"]),
        ("granite-3.1-2b", {"residual_multiplier": -1}, ["residual_multiplier", "-1"]),
        ("Phi-4-mini", {"partial_rotary_factor": 1.5}, ["partial_rotary_factor 1.5"]),
        ("Phi-4-mini", {"partial_rotary_factor": 0.5}, ["short_factor", "32 numbers"]),
        (
            "Phi-4-mini",
            {"rope_scaling": {"type": "yarn", "short_factor": [1.0] * 48, "long_factor": [8.0] * 48}},
            ["'yarn'", "short_factor"],
        ),
        ("Phi-4-mini", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["0.75", "linear"]),
        ("Mixtral-8x7B", {"num_experts_per_tok": 9}, ["num_experts_per_tok 9", "8"]),
        ("Mixtral-8x7B", {"num_local_experts": ...}, ["num_local_experts is missing"]),
        ("Mistral-7B-v0.1", {"sliding_window": 0}, ["sliding_window", "at least 1"]),
        ("Qwen3-30B-A3B", {"mlp_only_layers": [0]}, ["mlp_only_layers"]),
        ("Qwen3-30B-A3B", {"decoder_sparse_step": 2}, ["decoder_sparse_step"]),
    ],
)
def test_what_is_refused(tmp_path: Path, model: str, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as error:
        read(tmp_path, model, **changes)
    for word in [*words, str(tmp_path / "config.json")]:
        assert word in str(error.value)
