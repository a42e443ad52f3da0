"""Small models with random weights, in Hugging Face format, for the tests of every part.

They are written with transformers, so that it can be the reference for what is computed from them. Nothing
here is imported by the product.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def make_tiny_llama(
    folder: Path,
    *,
    num_layers: int = 4,
    num_heads: int = 9,
    num_kv_heads: int = 3,
    hidden: int | None = None,
    head_dim: int = 16,
    intermediate: int = 96,
    vocab: int = 384,
    tie: bool = True,
    rope_scaling: dict[str, Any] | None = None,
    rope_theta: float = 10000.0,
    max_model_len: int = 512,
    architecture: str = "LlamaForCausalLM",
    attention_bias: bool = False,
    mlp_bias: bool = False,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    seed: int = 0,
) -> Path:
    """Writes config.json, generation_config.json, safetensors, tokenizer.json, tokenizer_config.json.

    The tokenizer is byte-level: the special tokens 0 `<|endoftext|>`, 1 `<|im_start|>` (bos) and 2
    `<|im_end|>` (eos), then one token for each byte; what `vocab` has beyond that are tokens that no text
    encodes to. The weights are larger than an initialisation makes them, so that greedy tokens differ
    clearly. Returns the folder.
    """
    import transformers

    folder = Path(folder)
    if hidden is None:
        hidden = num_heads * head_dim
    options: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": max_model_len,
        "tie_word_embeddings": tie,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta, **(rope_scaling or {})},
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    if architecture == "LlamaForCausalLM":
        options |= {"attention_bias": attention_bias, "mlp_bias": mlp_bias}
        config: Any = transformers.LlamaConfig(**options)
    elif architecture == "MistralForCausalLM":
        config = transformers.MistralConfig(**options, sliding_window=None)
    elif architecture == "Qwen2ForCausalLM":
        config = transformers.Qwen2Config(**options)
    else:
        raise ValueError(f"no tiny model for {architecture}")
    return write_random(folder, architecture, config, seed, dtype, max_shard_size)


_HEADS_6_2 = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96, "head_dim": 16}
_HEADS_9_3 = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 144, "head_dim": 16}

TINY_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _HEADS_9_3),
    "llama-linear": (
        "Llama",
        {**_HEADS_6_2, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    # Original lengths below that of the prompts, so that low frequencies are stretched within them.
    "llama3": (
        "Llama",
        {
            **_HEADS_6_2,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen2-yarn": (
        "Qwen2",
        {
            **_HEADS_6_2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": ("Mistral", {**_HEADS_6_2, "sliding_window": 20}),
    "qwen2": (
        "Qwen2",
        {**_HEADS_9_3, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2},
    ),
    # Heads that are wider together than the hidden size, as Qwen3 has them.
    "qwen3": ("Qwen3", {**_HEADS_6_2, "hidden_size": 64, "attention_bias": True}),
    "smollm3": (
        "SmolLM3",
        {**_HEADS_9_3, "head_dim": None, "no_rope_layers": [1, 0, 1, 0], "tie_word_embeddings": True},
    ),
    "granite": (
        "Granite",
        {
            **_HEADS_6_2,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.11,
            "logits_scaling": 2.5,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "phi3": (
        "Phi3",
        {**_HEADS_9_3, "head_dim": None, "sliding_window": 20, "partial_rotary_factor": 0.75},
    ),
    "phi3-longrope": (
        "Phi3",
        {
            **_HEADS_6_2,
            "head_dim": None,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
                "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 8.0],
            },
        },
    ),
    "olmo2": ("Olmo2", {**_HEADS_6_2, "head_dim": None}),
    "olmo2-9-3": ("Olmo2", {**_HEADS_9_3, "head_dim": None, "attention_bias": True}),
    "gemma2": (
        "Gemma2",
        {
            **_HEADS_6_2,
            "sliding_window": 20,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 10.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            **_HEADS_9_3,
            "sliding_window": 20,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": ("Mixtral", {**_HEADS_6_2, "num_local_experts": 6, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            **_HEADS_9_3,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        },
    ),
    "qwen3-moe-plain": (
        "Qwen3Moe",
        {
            **_HEADS_6_2,
            # No expert fills the panels that kernels read.
            "hidden_size": 92,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 52,
            "norm_topk_prob": False,
        },
    ),
}
"""Name: what the classes of transformers are called, and what its config says. Windows are shorter than the
prompts of the tests, caps low enough to bite, and heads such that tensor parallelism cuts through groups."""


def make_tiny_family(folder: Path, name: str, seed: int = 0, dtype: str = "float32", **changes: Any) -> Path:
    """Writes a small random model of TINY_FAMILIES, as `make_tiny_llama` does: four layers, 384 tokens. `changes`
    replace what its config says."""
    import transformers

    prefix, options = TINY_FAMILIES[name]
    options = {
        "vocab_size": 384,
        "intermediate_size": 112,
        "num_hidden_layers": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        **options,
        **changes,
    }
    if "rope_parameters" in options:
        del options["rope_theta"]
    options = {key: value for key, value in options.items() if value is not None}
    config: Any = getattr(transformers, f"{prefix}Config")(**options)
    return write_random(folder, f"{prefix.removesuffix('Text')}ForCausalLM", config, seed, dtype)


def write_random(
    folder: Path,
    architecture: str,
    config: Any,
    seed: int,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
) -> Path:
    """Writes a model of that class with random weights, and a tokenizer."""
    import torch
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, architecture)(config)
        # Norms of Gemma are added to 1.
        offset = 1.0 if architecture.startswith("Gemma") else 0.0
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Norms and biases are ones and zeros as they are made: random ones show a mix-up.
                if name.endswith("norm.weight"):
                    parameter.uniform_(0.5 - offset, 1.5 - offset)
                elif name.endswith(".bias"):
                    parameter.normal_(0.0, 0.5)
                elif name.endswith("mlp.gate.weight"):
                    parameter.normal_(0.0, 0.3)
    model = model.to(getattr(torch, dtype))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    _write_tokenizer(folder, config.vocab_size)
    return folder


def _write_tokenizer(folder: Path, vocab: int) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab < len(SPECIAL_TOKENS) + len(alphabet):
        raise ValueError(f"vocab has to be at least {len(SPECIAL_TOKENS) + len(alphabet)}")
    names = [*SPECIAL_TOKENS, *alphabet]
    # Tokens that no text encodes to, but that a random model may well emit.
    names += [f"Ġ<{index}>" for index in range(len(names), vocab)]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|im_start|>",
                "eos_token": "<|im_end|>",
                "pad_token": "<|im_end|>",
                "unk_token": "<|endoftext|>",
                "clean_up_tokenization_spaces": False,
                "chat_template": CHAT_TEMPLATE,
            },
            indent=2,
        )
    )
