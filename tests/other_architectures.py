"""Small random models of architectures that our decoder does not have, and what transformers computes for them: the
oracle of tests/world/backends.

Run as `python -m tests.other_architectures`; everything is kept under build/ and made again only when its inputs
change. Ranks call `load`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from tests import family_references, tiny_models
from tests.family_references import FamilyReference

_SIZES = {
    "vocab_size": 384,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    # One fused projection, biases everywhere, attention and MLP side by side, a quarter of each head turned.
    "gpt-neox": (
        "GPTNeoX",
        {"hidden_size": 96, "num_attention_heads": 6, "intermediate_size": 160, "hidden_act": "gelu"},
    ),
    # Uneven heads with two ranks: 6 and 3 query heads, 2 and 1 KV heads. A window that the prompts cross.
    "starcoder2": (
        "Starcoder2",
        {
            "hidden_size": 144,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 160,
            "sliding_window": 20,
        },
    ),
    # Learned positions, ReLU, a head that looks into the decoder inside the model's body.
    "opt": (
        "OPT",
        {
            "hidden_size": 96,
            "num_attention_heads": 6,
            "ffn_dim": 160,
            "word_embed_proj_dim": 96,
            "do_layer_norm_before": True,
            "activation_function": "relu",
        },
    ),
    # Norms without weights' partner biases, neighbouring elements turned, logits scaled.
    "cohere": (
        "Cohere",
        {
            "hidden_size": 96,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "intermediate_size": 160,
            "logit_scale": 0.25,
        },
    ),
    # Four norms a layer, gate and up in one tensor, half of each head turned in neighbouring elements.
    "glm4": (
        "Glm4",
        {
            "hidden_size": 96,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 16,
            "intermediate_size": 160,
        },
    ),
    # Its layers keep the arguments of the forward pass from attention.
    "stablelm": (
        "StableLm",
        {
            "hidden_size": 96,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "intermediate_size": 160,
            "use_qkv_bias": True,
        },
    ),
}
"""Name: what the classes of transformers are called, and what its config says beside `_SIZES`."""


def make(folder: Path, name: str, **options: Any) -> Path:
    """Writes the model of that name, with `options` of its config changed."""
    import transformers

    prefix, config = ARCHITECTURES[name]
    made = getattr(transformers, f"{prefix}Config")(**{**_SIZES, **config, **options})
    return tiny_models.write_random(folder, f"{prefix}ForCausalLM", made, seed=0)


def load() -> dict[str, FamilyReference]:
    """The reference of each architecture by its name, computed first if it is not there."""
    return {name: _load(name) for name in ARCHITECTURES}


def _load(name: str) -> FamilyReference:
    inputs = [
        Path(module).read_bytes() for module in (__file__, family_references.__file__, tiny_models.__file__)
    ]
    key = hashlib.sha256(b"\0".join(inputs)).hexdigest()[:16]
    folder = family_references.ROOT / "build" / f"architectures-{key}" / name
    file = folder / "references.npz"
    if not file.is_file():
        family_references.compute(make(folder, name), file)
    return family_references.read(folder, file)


if __name__ == "__main__":
    for name, reference in load().items():
        gaps = np.sort(reference.logits, axis=-1)
        print(
            f"{name}: logits up to {np.abs(reference.logits).max():.1f}, closest first and second "
            f"{(gaps[..., -1] - gaps[..., -2]).min():.4f}"
        )
