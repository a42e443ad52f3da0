"""What `--backend deepspeed` must know of a model before it is loaded: sizes, end tokens, and whether it can run.

Called by `prepare` before a world starts, and by every rank. Reads config.json as transformers does; loads no
weights, and never runs code that lies in a model folder.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.models.config import SUPPORTED_DTYPES, eos_token_ids
from engine.models.config_keys import read_keys
from engine.models.errors import ModelError, ShardingError

INSTALL = "pip install 'phalanx-serve[deepspeed]'"

_PACKAGES = ("deepspeed", "transformers")
_LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}
"""Kinds of layers, as `layer_types` in config.json calls them, that a paged cache of keys and values can serve."""
_DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class HuggingFaceModel:
    """The facts about a model that transformers computes. Sizes are those of the whole model."""

    architecture: str
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    window: int | None
    """How many tokens some of the layers look back; None: all of them see every token."""
    dtype: str = "bfloat16"
    """What `--dtype auto` means."""

    @classmethod
    def from_folder(cls, folder: Path) -> HuggingFaceModel:
        """Raises ModelError for a model that this backend cannot serve, with the reason, and without its packages."""
        require_packages()
        file = folder / "config.json"
        if not file.is_file():
            raise ModelError(f"{folder} is not a model folder: it has no config.json")
        keys = read_keys(file)
        config = read_config(folder)
        architecture = _architecture(keys.data, file)
        _refuse_what_has_no_cache_of_keys(config, keys.data, architecture, file)
        sizes = {
            name: _positive(getattr(config, name, None), name, file)
            for name in ("vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size")
        }
        num_heads = sizes["num_attention_heads"]
        return cls(
            architecture=architecture,
            vocab_size=sizes["vocab_size"],
            num_layers=sizes["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=_positive(
                getattr(config, "num_key_value_heads", None) or num_heads, "num_key_value_heads", file
            ),
            hidden_size=sizes["hidden_size"],
            max_model_len=_max_model_len(config),
            eos_token_ids=eos_token_ids(folder, keys, sizes["vocab_size"]),
            window=_window(config),
        )

    def check_shape(self, tp: int, pp: int) -> None:
        """Raises ShardingError for a world that the model cannot be cut over."""
        if pp != 1:
            raise ShardingError(
                f"--pp {pp} is not possible with --backend deepspeed, which cuts layers and never deals them out: "
                "use --pp 1 and more --tp"
            )
        if not 1 <= tp <= self.num_kv_heads:
            raise ShardingError(
                f"--tp {tp} is not possible: with --backend deepspeed every rank takes whole key-value heads, and "
                f"the model has {self.num_kv_heads}, so --tp may be 1 to {self.num_kv_heads}"
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


def require_packages() -> None:
    """Raises ModelError if the backend's packages are not installed."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"--backend deepspeed needs {' and '.join(missing)}, which is not installed; install with {INSTALL}"
        )


def read_config(folder: Path) -> Any:
    """The model's config as transformers reads it. Raises ModelError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise ModelError(
            f"{folder / 'config.json'} is not one that transformers can read: {reason}"
        ) from None


def model_class(architecture: str) -> Any:
    """The class of transformers of that name, once `from_folder` knows that there is one."""
    import transformers

    return getattr(transformers, architecture)


def _architecture(data: dict[str, Any], file: Path) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = data.get("architectures")
    if not isinstance(names, list) or not names:
        raise ModelError(f"{file}: architectures is missing; it names the class of transformers to run")
    name = str(names[0])
    known: set[str] = set()
    for entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        known.update([entry] if isinstance(entry, str) else entry)
    if name not in known:
        raise ModelError(
            f"{file}: architecture {name} is not one of transformers' models that generate text from text alone; "
            "--backend deepspeed runs those, and no code out of a model folder"
        )
    return name


def _refuse_what_has_no_cache_of_keys(
    config: Any, data: dict[str, Any], architecture: str, file: Path
) -> None:
    def refuse(reason: str) -> None:
        raise ModelError(f"{file}: --backend deepspeed cannot run {architecture}: {reason}")

    if data.get("quantization_config"):
        refuse("quantization_config is set; take the model's unquantized weights")
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        refuse("it has an encoder or cross attention, and only decoders of text are served")
    if config.get_text_config() is not config:
        refuse("it reads images or sound beside text (its config has parts for them)")
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if others:
        refuse(
            f"its layers of the kind {', '.join(others)} keep another state than keys and values, "
            "which the paged cache does not hold"
        )
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) == "alibi":
        refuse("its positions are biases on the scores (ALiBi), which paged attention does not add")
    if not hasattr(sys.modules[model_class(architecture).__module__], "ALL_ATTENTION_FUNCTIONS"):
        refuse(
            "its attention does not go through transformers' attention interface, so that it cannot be replaced "
            "by one over the paged cache"
        )


def _positive(value: Any, name: str, file: Path) -> int:
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{file}: {name} is {value!r}; --backend deepspeed needs a whole number above 0")
    return value


def _max_model_len(config: Any) -> int:
    longest = getattr(config, "max_position_embeddings", None)
    longest = longest if isinstance(longest, int) and longest > 0 else _DEFAULT_LENGTH
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    for part in parts:
        if part.get("rope_type") == "longrope":
            # Beyond it the model turns all keys otherwise, also those that are in the cache.
            original = part.get("original_max_position_embeddings") or longest
            longest = min(longest, int(original))
    return longest


def _window(config: Any) -> int | None:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    slides = "sliding_attention" in types if types else getattr(config, "use_sliding_window", True)
    return int(window) if window and slides else None
