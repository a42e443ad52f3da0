"""Rotary tables against those of transformers, for every scaling that is supported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.models.config import ModelConfig
from engine.models.rotary import rotary_tables

NUM_POSITIONS = 4096
MODEL_LEN = 2048

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn with everything": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    },
    "yarn with a given temperature": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "attention_factor": 1.25,
    },
}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_parity_with_transformers(tmp_path: Path, scaling: dict[str, Any], head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    reference_config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=64,
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        num_hidden_layers=1,
        intermediate_size=16,
        max_position_embeddings=MODEL_LEN,
        rope_parameters={"rope_theta": 10000.0, **scaling},
    )
    reference_config.save_pretrained(tmp_path)
    config = ModelConfig.from_folder(tmp_path)

    cosine, sine = rotary_tables(config.rope, config.head_dim, NUM_POSITIONS)
    positions = torch.arange(NUM_POSITIONS)[None]
    reference = LlamaRotaryEmbedding(reference_config)
    expected_cosine, expected_sine = reference(torch.zeros(1, dtype=torch.float32), positions)

    assert cosine.shape == sine.shape == (NUM_POSITIONS, head_dim // 2)
    assert cosine.dtype == sine.dtype == torch.float32
    # One float32 rounding of a frequency turns into 4096 of them at the last position.
    torch.testing.assert_close(cosine, expected_cosine[0, :, : head_dim // 2], atol=1e-3, rtol=0)
    torch.testing.assert_close(sine, expected_sine[0, :, : head_dim // 2], atol=1e-3, rtol=0)
    torch.testing.assert_close(cosine[:64], expected_cosine[0, :64, : head_dim // 2], atol=1e-5, rtol=0)


def test_dynamic_scaling_is_none_up_to_the_models_length(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    for name, scaling in (("plain", {"rope_type": "default"}), ("dynamic", SCALINGS["dynamic"])):
        LlamaConfig(
            architectures=["LlamaForCausalLM"],
            max_position_embeddings=MODEL_LEN,
            rope_parameters={"rope_theta": 10000.0, **scaling},
        ).save_pretrained(tmp_path / name)
    plain, dynamic = (
        rotary_tables(ModelConfig.from_folder(tmp_path / name).rope, 128, MODEL_LEN)
        for name in ("plain", "dynamic")
    )
    assert torch.equal(plain[0], dynamic[0])
    assert torch.equal(plain[1], dynamic[1])


@pytest.mark.parametrize("rope_type", ["default", "longrope"])
def test_partial_rotary_and_longrope_of_phi_3(tmp_path: Path, rope_type: str) -> None:
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    head_dim, original = 64, 1024
    parameters: dict[str, Any] = {
        "rope_type": rope_type,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
    }
    if rope_type == "longrope":
        parameters["short_factor"] = [1.0 + 0.05 * pair for pair in range(24)]
        parameters["long_factor"] = [2.0 + 0.5 * pair for pair in range(24)]
    reference_config = Phi3Config(
        architectures=["Phi3ForCausalLM"],
        vocab_size=64,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        num_hidden_layers=1,
        intermediate_size=16,
        max_position_embeddings=4 * original,
        original_max_position_embeddings=original,
        rope_parameters=parameters,
    )
    reference_config.save_pretrained(tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    if rope_type == "longrope":
        assert config.max_model_len == original, "beyond it, keys in the cache would have to turn anew"
    cosine, sine = rotary_tables(config.rope, config.head_dim, original)
    expected_cosine, expected_sine = Phi3RotaryEmbedding(reference_config)(
        torch.zeros(1, dtype=torch.float32), torch.arange(original)[None]
    )
    assert cosine.shape == sine.shape == (original, 24)
    torch.testing.assert_close(cosine, expected_cosine[0, :, :24], atol=3e-4, rtol=0)
    torch.testing.assert_close(sine, expected_sine[0, :, :24], atol=3e-4, rtol=0)


def test_longrope_is_not_served_beyond_its_original_length(tmp_path: Path) -> None:
    """Where transformers takes the other factors and computes the whole context anew."""
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    from engine.engine import ConfigurationError, EngineSettings, scheduler_limits

    reference_config = Phi3Config(
        architectures=["Phi3ForCausalLM"],
        vocab_size=64,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=1,
        intermediate_size=16,
        max_position_embeddings=1024,
        original_max_position_embeddings=128,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + index for index in range(8)],
            "long_factor": [3.0 + index for index in range(8)],
        },
    )
    reference_config.save_pretrained(tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    reference = Phi3RotaryEmbedding(reference_config)
    within, beyond = (reference(torch.zeros(1), torch.arange(length)[None])[0] for length in (128, 129))
    assert (within[0] - beyond[0, :128]).abs().max() > 0.1, "one token more, and the first keys are others"
    torch.testing.assert_close(rotary_tables(config.rope, 16, 128)[0], within[0, :, :8], atol=1e-4, rtol=0)

    def limit(tokens: int) -> int:
        settings = EngineSettings(model_dir=tmp_path, shard_cache=tmp_path, max_model_len=tokens)
        return scheduler_limits(settings, config).max_model_len

    assert (limit(0), limit(128), limit(100)) == (128, 128, 100)
    with pytest.raises(ConfigurationError, match=r"--max-model-len 129 .* 128 \(longrope: .*1 to 128"):
        limit(129)
