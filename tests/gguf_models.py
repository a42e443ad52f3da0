"""Writes models in Hugging Face format as GGUF files, the way llama.cpp's converter does.

For the tests of the importer, and written independently of it: names of tensors come from the `gguf` package,
which is llama.cpp's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

_ROTATES_NEIGHBOURS = ("llama", "granite", "smollm3")
_ADDS_TO_NORMS = ("gemma2", "gemma3")
_EXPERT_PARTS = {
    "w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps",
    "gate_proj": "ffn_gate_exps", "down_proj": "ffn_down_exps", "up_proj": "ffn_up_exps",
}  # fmt: skip


def write_family(
    folder: Path,
    file: Path,
    architecture: str,
    *,
    metadata: dict[str, Any] | None = None,
    leave_out: tuple[str, ...] = (),
    replaced: dict[str, np.ndarray] | None = None,
) -> Path:
    """The model of `folder` as F32. `metadata` replaces keys, None takes one away; `replaced` tensors by their names
    in GGUF, or adds some."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(file, architecture)
    values = {**_metadata(architecture, config), **_tokens(config["vocab_size"]), **(metadata or {})}
    for key, value in values.items():
        if value is not None:
            _add(writer, key, value)
    tensors = {**dict(_tensors(folder, architecture, config)), **(replaced or {})}
    for name, tensor in tensors.items():
        if name not in leave_out:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _metadata(architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    """What `set_gguf_parameters` of the converter's classes writes."""
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    values: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    if architecture not in ("granite", "olmo2", "phi3"):
        values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if architecture in _ROTATES_NEIGHBOURS:
        values["rope.dimension_count"] = head_dim
    if rope.get("rope_type") == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if architecture == "phi3":
        original = config.get("original_max_position_embeddings") or config["max_position_embeddings"]
        part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        values |= {
            "rope.scaling.original_context_length": original,
            "rope.dimension_count": int(part * config["hidden_size"]) // heads,
            "attention.sliding_window": config.get("sliding_window") or 0,
        }
    if architecture == "granite":
        values |= {
            "attention.scale": config["attention_multiplier"],
            "embedding_scale": config["embedding_multiplier"],
            "residual_scale": config["residual_multiplier"],
            "logit_scale": config["logits_scaling"],
        }
    if architecture == "gemma2":
        values |= {
            "attn_logit_softcapping": config["attn_logit_softcapping"],
            "final_logit_softcapping": config["final_logit_softcapping"],
            "attention.sliding_window": config["sliding_window"],
        }
    if architecture == "gemma3":
        values["attention.sliding_window"] = config["sliding_window"]
    experts = config.get("num_local_experts") or config.get("num_experts")
    if experts:
        values |= {"expert_count": experts, "expert_used_count": config["num_experts_per_tok"]}
        if architecture == "qwen3moe":
            values["expert_feed_forward_length"] = config["moe_intermediate_size"]
    return {f"{architecture}.{key}": value for key, value in values.items()}


def _tokens(vocab_size: int) -> dict[str, Any]:
    """A byte-level vocabulary, nearly that of tiny_models."""
    from tokenizers import pre_tokenizers

    names = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "he",
    ]
    names += [f"<{index}>" for index in range(len(names), vocab_size)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (vocab_size - 3),
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def _tensors(folder: Path, architecture: str, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    layers = config["num_hidden_layers"]
    enum = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(enum, layers)
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        data = tensor.float().numpy()
        if ".experts." in name:
            layer, rest = name.removeprefix("model.layers.").split(".", 1)
            _, expert, part, _ = rest.rsplit(".", 3)
            experts.setdefault(f"blk.{layer}.{_EXPERT_PARTS[part]}.weight", {})[int(expert)] = data
            continue
        if architecture in _ROTATES_NEIGHBOURS:
            if ".q_proj." in name:
                data = permuted(data, config["num_attention_heads"])
            if ".k_proj." in name:
                data = permuted(data, config["num_key_value_heads"])
        if architecture in _ADDS_TO_NORMS and name.endswith("norm.weight"):
            data = data + 1
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new_name is not None, name
        yield new_name, data
    for name, parts in experts.items():
        yield name, np.stack([parts[expert] for expert in range(len(parts))])
    scaling = config.get("rope_parameters") or {}
    if scaling.get("rope_type") == "longrope":
        yield "rope_factors_long.weight", np.array(scaling["long_factor"], np.float32)
        yield "rope_factors_short.weight", np.array(scaling["short_factor"], np.float32)


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of the converter."""
    parts = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return parts.swapaxes(1, 2).reshape(weights.shape)
