"""What is read from config.json and generation_config.json, and what is refused, with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.models.config import SUPPORTED_ARCHITECTURES, ModelConfig
from engine.models.errors import ModelError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}


def read(folder: Path, generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """The config of Llama 3.2 1B with some keys changed; a key set to `...` is left out."""
    data = {key: value for key, value in {**LLAMA, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(data))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_folder(folder)


def test_a_published_config(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert config.architecture == "LlamaForCausalLM"
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (16, 32, 8, 64)
    assert config.max_model_len == 131072
    assert config.rope.scaling == "llama3"
    assert config.rope.theta == 500000.0
    assert config.rope.original_max_position == 8192
    assert (config.bos_token_id, config.eos_token_ids) == (128000, (128001, 128008, 128009))
    assert config.tie_word_embeddings
    assert not (config.attention_bias or config.attention_output_bias or config.mlp_bias)
    assert config.dtype == "bfloat16"
    assert config == read(tmp_path)
    assert hash(config) == hash(read(tmp_path))


def test_defaults_are_those_of_the_format(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        head_dim=...,
        num_key_value_heads=...,
        tie_word_embeddings=...,
        rope_theta=...,
        rope_scaling=None,
        eos_token_id=None,
        bos_token_id=...,
    )
    assert (config.head_dim, config.num_kv_heads) == (64, 32)
    assert not config.tie_word_embeddings
    assert (config.rope.theta, config.rope.scaling) == (10000.0, "none")
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


def test_the_form_of_transformers_5(tmp_path: Path) -> None:
    parameters = {**LLAMA["rope_scaling"], "rope_theta": 500000.0}
    assert read(tmp_path, rope_theta=..., rope_scaling=..., rope_parameters=parameters) == read(tmp_path)


def test_the_form_of_old_files(tmp_path: Path) -> None:
    config = read(tmp_path, rope_scaling={"type": "linear", "factor": 4})
    assert (config.rope.scaling, config.rope.factor, config.rope.theta) == ("linear", 4.0, 500000.0)


def test_end_tokens_of_both_files(tmp_path: Path) -> None:
    config = read(tmp_path, generation={"eos_token_id": [7, 128001]}, eos_token_id=128001)
    assert config.eos_token_ids == (7, 128001)
    assert read(tmp_path, generation={"eos_token_id": 9}, eos_token_id=...).eos_token_ids == (9,)


def test_qwen_2_has_biases_on_q_k_v_only(tmp_path: Path) -> None:
    config = read(tmp_path, architectures=["Qwen2ForCausalLM"], rope_scaling=None, sliding_window=4096)
    assert config.attention_bias
    assert not config.attention_output_bias
    assert config.windows == (), "its sliding window is off unless use_sliding_window says so"


def test_llama_with_biases_has_them_everywhere(tmp_path: Path) -> None:
    config = read(tmp_path, attention_bias=True, mlp_bias=True)
    assert config.attention_bias
    assert config.attention_output_bias
    assert config.mlp_bias


def test_yarn_lengthens_a_model_whose_length_was_left_as_it_was(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = read(tmp_path, max_position_embeddings=32768, rope_scaling=scaling)
    assert config.max_model_len == 131072
    assert config.rope.attention_factor == pytest.approx(1.1386294)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", *SUPPORTED_ARCHITECTURES]),
        ({"architectures": ...}, ["architectures is missing", *SUPPORTED_ARCHITECTURES]),
        ({"hidden_size": ...}, ["hidden_size is missing"]),
        ({"hidden_size": "big"}, ["hidden_size", "'big'"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "at least 1"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers", "True"]),
        ({"num_key_value_heads": 5}, ["num_attention_heads 32", "num_key_value_heads 5"]),
        ({"head_dim": None, "hidden_size": 2050}, ["hidden_size 2050", "head_dim is missing"]),
        ({"head_dim": 65}, ["head_dim 65", "even"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps"]),
        ({"hidden_act": "gelu"}, ["gelu", "silu", "gelu_pytorch_tanh"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "unquantized"]),
        ({"rope_scaling": {"rope_type": "proportional"}}, ["proportional", "yarn", "llama3", "longrope"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["factor is missing"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, ["low_freq_factor is missing"]),
        ({"rope_scaling": {"full_attention": {}, "sliding_attention": {}}}, ["flat"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "true or false"]),
        ({"eos_token_id": 200000}, ["eos_token_id", "200000", "128255"]),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as error:
        read(tmp_path, **changes)
    for word in [*words, str(tmp_path / "config.json")]:
        assert word in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "\xff\xfe", ""])
def test_files_that_are_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_dtypes(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert [config.resolve_dtype(flag) for flag in ("auto", "float32", "bfloat16")] == [
        "bfloat16",
        "float32",
        "bfloat16",
    ]
    with pytest.raises(ModelError, match="--dtype int8"):
        config.resolve_dtype("int8")
