"""The rotary embedding of a GGUF file, in the terms of config.json.

Called by gguf_families. What a file holds as factors is turned back into the formula that they came from, or refused.
"""

from __future__ import annotations

from typing import Any

from engine.models.errors import ModelError
from engine.models.gguf_file import GgufFile

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Not weights of the model: they go into config.json."""

_LLAMA3, _LONG, _SHORT = ROPE_TENSORS


def rope_settings(gguf: GgufFile, name: str, head_dim: int, rotated: int) -> dict[str, Any]:
    """The keys `rope_theta`, `rope_scaling` and, where a part of each head is turned, `partial_rotary_factor`."""
    settings: dict[str, Any] = {
        "rope_theta": gguf.number(f"{name}.rope.freq_base", 10000.0),
        "rope_scaling": _scaling(gguf, name),
    }
    if rotated != head_dim:
        settings["partial_rotary_factor"] = rotated / head_dim
    return settings


def _scaling(gguf: GgufFile, name: str) -> dict[str, Any] | None:
    if _SHORT in gguf.tensors or _LONG in gguf.tensors:
        return _longrope(gguf, name)
    if _LLAMA3 in gguf.tensors:
        return _llama3(gguf, name)
    section = f"{name}.rope.scaling"
    # The older name of the only scaling that there was.
    linear = gguf.number(f"{name}.rope.scale_linear", 1.0)
    kind = gguf.get(f"{section}.type", str, "linear" if linear != 1.0 else "none")
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": gguf.number(f"{section}.factor", linear)}
    if kind != "yarn":
        raise ModelError(
            f"{gguf.path}: rope scaling {kind!r} is not supported; supported are linear, yarn, and "
            "longrope with its factors"
        )
    scaling = {
        "rope_type": "yarn",
        "factor": gguf.number(f"{section}.factor"),
        "original_max_position_embeddings": gguf.size(
            f"{section}.original_context_length", at_most=2**31 - 1
        ),
    }
    for key, ours in (
        ("yarn_attn_factor", "attention_factor"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ):
        if gguf.has(f"{section}.{key}"):
            scaling[ours] = gguf.number(f"{section}.{key}")
    return scaling


def _longrope(gguf: GgufFile, name: str) -> dict[str, Any]:
    for tensor in (_SHORT, _LONG):
        if tensor not in gguf.tensors:
            raise ModelError(f"{gguf.path}: tensor {tensor} is missing; the model is not complete")
    original = gguf.size(f"{name}.rope.scaling.original_context_length", at_most=2**31 - 1)
    return {
        "rope_type": "longrope",
        "factor": gguf.size(f"{name}.context_length", at_most=2**31 - 1) / original,
        "original_max_position_embeddings": original,
        "short_factor": gguf.floats(_SHORT),
        "long_factor": gguf.floats(_LONG),
    }


def _llama3(gguf: GgufFile, name: str) -> dict[str, Any]:
    """GGUF keeps what Llama 3's scaling comes to for each frequency; the formula's numbers are found again by
    trying those that Llama 3.1 to 3.3 were published with."""
    import numpy as np

    factors = np.array(gguf.floats(_LLAMA3))
    theta = gguf.number(f"{name}.rope.freq_base", 10000.0)
    low, high, original, factor = 1.0, 4.0, 8192, float(factors.max())
    wavelengths = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    blend = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    if not np.allclose(factors, 1 / ((1 - blend) / factor + blend), rtol=1e-3):
        raise ModelError(f"{gguf.path}: {_LLAMA3} holds a rope scaling that is not Llama 3's")
    return {
        "rope_type": "llama3",
        "factor": round(factor, 4),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
