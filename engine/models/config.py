"""What a model is: its sizes, its rotary embedding and its special tokens, read from a Hugging Face folder.

Called by `prepare` before a world starts and by every rank. Imports no torch. It never guesses: whatever it
does not know how to compute exactly is refused by name.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.models.errors import ModelError

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
"""Names as they stand under `architectures` in config.json."""

SUPPORTED_DTYPES = ("float32", "bfloat16")
"""What a world computes in; `--dtype auto` is the dtype of the config."""

ROPE_SCALINGS = ("none", "linear", "dynamic", "llama3", "yarn")

_SCALINGS_WITH_ORIGINAL_LENGTH = ("llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """A rotary embedding, with the scaling that stretches it over longer contexts.

    Formulas: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071), and the Llama 3.1 release for `llama3`.
    """

    theta: float
    scaling: str = "none"
    """One of ROPE_SCALINGS."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    """`llama3` only, as `high_freq_factor`."""
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    """Positions that the model was trained on before scaling. 0 where the scaling does not use it."""
    beta_fast: float = 32.0
    """`yarn` only, as `beta_slow` and `truncate`."""
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """What cosine and sine are multiplied with."""


@dataclass(frozen=True)
class ModelConfig:
    """The facts about a decoder of the Llama family. Sizes are those of the whole model, before any cut."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
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

    @classmethod
    def from_folder(cls, path: Path) -> ModelConfig:
        """Reads config.json and, where there is one, generation_config.json.

        Raises ModelError with the file, the key and the remedy.
        """
        file = path / "config.json"
        if not file.is_file():
            raise ModelError(f"{path} is not a model folder: it has no config.json")
        keys = _Keys(file, _read_json(file))
        architecture = _architecture(keys)
        if keys.data.get("quantization_config"):
            raise ModelError(
                f"{file}: quantization_config is set, and quantized weights are not supported; "
                "take the model's unquantized weights"
            )
        activation = keys.data.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ModelError(f"{file}: hidden_act {activation!r} is not supported; supported is silu")

        hidden_size = keys.integer("hidden_size")
        num_heads = keys.integer("num_attention_heads")
        num_kv_heads = keys.integer("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise ModelError(
                f"{file}: num_attention_heads {num_heads} is not a multiple of "
                f"num_key_value_heads {num_kv_heads}"
            )
        if keys.data.get("head_dim") is None and hidden_size % num_heads:
            raise ModelError(
                f"{file}: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, "
                "and head_dim is missing"
            )
        head_dim = keys.integer("head_dim", hidden_size // num_heads)
        if head_dim % 2:
            raise ModelError(f"{file}: head_dim {head_dim} is odd; a rotary embedding needs an even one")

        max_position = keys.integer("max_position_embeddings", 2048)
        rope = _rope(keys, max_position)
        is_llama = architecture == "LlamaForCausalLM"
        attention_bias = keys.boolean("attention_bias", False)
        vocab_size = keys.integer("vocab_size")
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=keys.integer("intermediate_size"),
            num_layers=keys.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
            rope=rope,
            tie_word_embeddings=keys.boolean("tie_word_embeddings", False),
            # Llama's flag gives all four projections a bias; Qwen 2 has one on q, k and v, flag or no flag.
            attention_bias=architecture == "Qwen2ForCausalLM" or (is_llama and attention_bias),
            attention_output_bias=is_llama and attention_bias,
            mlp_bias=is_llama and keys.boolean("mlp_bias", False),
            max_model_len=_max_model_len(keys, architecture, max_position, rope),
            bos_token_id=next(iter(keys.token_ids("bos_token_id", vocab_size)), None),
            eos_token_ids=_eos_token_ids(path, keys, vocab_size),
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


class _Keys:
    """A JSON object whose values are checked as they are taken; every refusal names file and key."""

    def __init__(self, file: Path, data: dict[str, Any]) -> None:
        self.file = file
        self.data = data

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{self.file}: {key} is {value!r}; it has to be a whole number of at least 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or value <= 0
        ):
            raise ModelError(f"{self.file}: {key} is {value!r}; it has to be a number above 0")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise ModelError(f"{self.file}: {key} is {value!r}; it has to be true or false")
        return value

    def token_ids(self, key: str, vocab_size: int) -> list[int]:
        value = self.data.get(key)
        if value is None:
            return []
        ids = value if isinstance(value, list) else [value]
        # -1 stands for "none" in files that older tools wrote.
        ids = [token for token in ids if token != -1]
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise ModelError(
                    f"{self.file}: {key} holds {token!r}; a token id lies between 0 and {vocab_size - 1}"
                )
        return ids

    def _value(self, key: str, default: Any) -> Any:
        value = self.data.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.file}: {key} is missing")
        return value


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{file} does not hold a JSON object")
    return data


def _architecture(keys: _Keys) -> str:
    names = keys.data.get("architectures")
    allowed = ", ".join(SUPPORTED_ARCHITECTURES)
    if not isinstance(names, list) or not names:
        raise ModelError(f"{keys.file}: architectures is missing; supported are {allowed}")
    for name in names:
        if name in SUPPORTED_ARCHITECTURES:
            return str(name)
    raise ModelError(f"{keys.file}: architecture {names[0]} is not supported; supported are {allowed}")


def _rope(keys: _Keys, max_position: int) -> RopeConfig:
    # `rope_parameters` is what transformers 5 writes, with theta inside; `rope_scaling` beside a
    # `rope_theta` is the older form, and wins in transformers where both are there.
    raw = keys.data.get("rope_scaling") or keys.data.get("rope_parameters") or {}
    if not isinstance(raw, dict) or any(isinstance(value, dict) for value in raw.values()):
        raise ModelError(
            f"{keys.file}: rope_parameters has to be one flat object; one a layer type is not supported"
        )
    rope = _Keys(keys.file, raw)
    theta = rope.number("rope_theta", keys.number("rope_theta", 10000.0))
    scaling = raw.get("rope_type", raw.get("type")) or "default"
    if scaling == "default":
        scaling = "none"
    if scaling not in ROPE_SCALINGS:
        allowed = ", ".join(["default", *ROPE_SCALINGS[1:]])
        raise ModelError(f"{keys.file}: rope_type {scaling!r} is not supported; supported are {allowed}")
    partial = rope.number("partial_rotary_factor", keys.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ModelError(f"{keys.file}: partial_rotary_factor {partial} is not supported; supported is 1.0")
    if scaling == "none":
        return RopeConfig(theta)
    if scaling == "dynamic":
        return RopeConfig(theta, scaling, rope.number("factor"), original_max_position=max_position)
    if scaling == "linear":
        return RopeConfig(theta, scaling, rope.number("factor"))

    original = keys.integer(
        "original_max_position_embeddings", rope.integer("original_max_position_embeddings", max_position)
    )
    if scaling == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise ModelError(f"{keys.file}: low_freq_factor {low} has to lie below high_freq_factor {high}")
        return RopeConfig(
            theta,
            scaling,
            rope.number("factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position=original,
        )
    factor = rope.number("factor", max_position / original)
    return RopeConfig(
        theta,
        scaling,
        factor,
        original_max_position=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.boolean("truncate", True),
        attention_factor=_yarn_attention_factor(raw, rope, factor),
    )


def _yarn_attention_factor(raw: dict[str, Any], rope: _Keys, factor: float) -> float:
    """The temperature of YaRN, section 3.4; DeepSeek's variant gives it as the ratio of two."""

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0

    if raw.get("attention_factor") is not None:
        return rope.number("attention_factor")
    if raw.get("mscale") and raw.get("mscale_all_dim"):
        return magnitude(rope.number("mscale")) / magnitude(rope.number("mscale_all_dim"))
    return magnitude(1.0)


def _max_model_len(keys: _Keys, architecture: str, max_position: int, rope: RopeConfig) -> int:
    length = max_position
    if rope.scaling == "yarn":
        # Files that switch YaRN on by hand leave max_position_embeddings at the original length.
        length = max(length, int(rope.original_max_position * rope.factor))
    window = keys.data.get("sliding_window")
    if architecture == "Qwen2ForCausalLM" and not keys.data.get("use_sliding_window"):
        window = None
    if window is not None and architecture != "LlamaForCausalLM":
        # Attention is computed over the whole context, which is the same thing up to the window's length.
        length = min(length, keys.integer("sliding_window"))
    return length


def _eos_token_ids(path: Path, keys: _Keys, vocab_size: int) -> tuple[int, ...]:
    ids: list[int] = []
    generation = path / "generation_config.json"
    if generation.is_file():
        ids += _Keys(generation, _read_json(generation)).token_ids("eos_token_id", vocab_size)
    ids += keys.token_ids("eos_token_id", vocab_size)
    return tuple(dict.fromkeys(ids))
