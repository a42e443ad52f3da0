"""Rotary position embeddings: the tables of cosines and sines that attention reads.

Called by each stage when it is built, once for each kind of embedding. Pure functions of the config; nothing
here depends on a request, so that a token's rotation is the same in every world.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.models.config import RopeConfig


def rotary_tables(rope: RopeConfig, head_dim: int, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine for positions 0 to `num_positions` - 1: two tensors [num_positions, rotary_dim // 2],
    float32. rotary_dim is head_dim, or the part of it that is turned.

    Element i of a head is rotated with element i + rotary_dim // 2 ("rotate half", as Hugging Face stores q
    and k). The attention factor is applied already. `dynamic` scaling is fixed at `num_positions`: its base would
    otherwise grow with each sequence, and keys that are in the cache already would be rotated wrongly. Up to
    the length that the model was trained on, that is no scaling at all.
    """
    frequencies = inverse_frequencies(rope, rope.rotary_dim(head_dim), num_positions)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies[None, :]
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


def inverse_frequencies(rope: RopeConfig, rotary_dim: int, num_positions: int) -> Tensor:
    """Radians a position for each pair of a head's turned elements: float32 [rotary_dim // 2]."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    if rope.scaling == "dynamic":
        length = max(num_positions, rope.original_max_position)
        stretch = rope.factor * length / rope.original_max_position - (rope.factor - 1)
        return 1.0 / (rope.theta * stretch ** (rotary_dim / (rotary_dim - 2))) ** exponents
    plain = 1.0 / rope.theta**exponents
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "llama3":
        return _llama3(rope, plain)
    if rope.scaling == "yarn":
        return _yarn(rope, rotary_dim, exponents)
    if rope.scaling == "longrope":
        return 1.0 / (torch.tensor(rope.wavelength_factors) * rope.theta**exponents)
    return plain


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Long wavelengths are stretched, short ones kept, and those between are blended (Llama 3.1)."""
    wavelengths = 2 * math.pi / plain
    blend = (rope.original_max_position / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * plain / rope.factor + blend * plain


def _yarn(rope: RopeConfig, rotary_dim: int, exponents: Tensor) -> Tensor:
    """ "NTK by parts" of YaRN, section 3.2: a ramp over the dimensions from keeping to stretching."""

    def dimension(rotations: float) -> float:
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return rotary_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    wavelengths = rope.theta**exponents
    return ramp / (rope.factor * wavelengths) + (1 - ramp) / wavelengths
