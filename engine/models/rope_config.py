"""What a rotary embedding is made of, as config.json says it.

Called by `config`; `rotary` computes the tables. Imports no torch. A scaling that is not known exactly is
refused by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from engine.models.config_keys import Keys
from engine.models.errors import ModelError

ROPE_SCALINGS = ("none", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class RopeConfig:
    """A rotary embedding, with the scaling that stretches it over longer contexts.

    Formulas: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071), LongRoPE (arXiv 2402.13753), and the
    Llama 3.1 release for `llama3`.
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
    rotary_fraction: float = 1.0
    """The share of each head, from its first element on, that is turned; the rest is left as it is."""
    wavelength_factors: tuple[float, ...] = ()
    """`longrope` only: one for each pair of turned elements. They are those for contexts up to
    `original_max_position`; the model has others beyond, with which no key of a shorter context agrees, so
    that its length ends there."""

    def rotary_dim(self, head_dim: int) -> int:
        """Elements of a head that are turned."""
        return int(head_dim * self.rotary_fraction)


def read_rope(
    keys: Keys, raw: dict[str, Any], max_position: int, head_dim: int, default_theta: float, partial: bool
) -> RopeConfig:
    """The rotary embedding that the object `raw` of the file describes; keys beside it count, too, as in old
    files. `partial`: the family may turn a part of each head only. Raises ModelError."""
    rope = Keys(keys.file, raw)
    theta = rope.number("rope_theta", keys.number("rope_theta", default_theta))
    scaling = raw.get("rope_type", raw.get("type")) or "default"
    # Phi-3's first files said "su", which was a name for the same thing.
    scaling = {"default": "none", "su": "longrope"}.get(scaling, scaling)
    if scaling not in ROPE_SCALINGS:
        allowed = ", ".join(["default", *ROPE_SCALINGS[1:]])
        raise ModelError(f"{keys.file}: rope_type {scaling!r} is not supported; supported are {allowed}")
    if scaling != "longrope" and "short_factor" in raw:
        raise ModelError(
            f"{keys.file}: rope_type {scaling!r} with short_factor is not supported; longrope is"
        )
    fraction = rope.number("partial_rotary_factor", keys.number("partial_rotary_factor", 1.0))
    if fraction > 1.0 or (fraction < 1.0 and not partial):
        raise ModelError(f"{keys.file}: partial_rotary_factor {fraction} is not supported; supported is 1.0")
    if scaling == "none":
        return RopeConfig(theta, rotary_fraction=fraction)
    if fraction < 1.0 and scaling != "longrope":
        raise ModelError(
            f"{keys.file}: partial_rotary_factor {fraction} with rope_type {scaling} is not supported; "
            "supported with it are default and longrope"
        )
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
    if scaling == "longrope":
        return RopeConfig(
            theta,
            scaling,
            factor,
            original_max_position=original,
            attention_factor=_longrope_attention_factor(rope, factor, original),
            rotary_fraction=fraction,
            wavelength_factors=rope.numbers("short_factor", int(head_dim * fraction) // 2),
        )
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


def _longrope_attention_factor(rope: Keys, factor: float, original: int) -> float:
    """LongRoPE, section 3.3, unless the file gives the number."""
    given = rope.optional_number("attention_factor")
    if given is not None:
        return given
    return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))


def _yarn_attention_factor(raw: dict[str, Any], rope: Keys, factor: float) -> float:
    """The temperature of YaRN, section 3.4; DeepSeek's variant gives it as the ratio of two."""

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0

    if raw.get("attention_factor") is not None:
        return rope.number("attention_factor")
    if raw.get("mscale") and raw.get("mscale_all_dim"):
        return magnitude(rope.number("mscale")) / magnitude(rope.number("mscale_all_dim"))
    return magnitude(1.0)
