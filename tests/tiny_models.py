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
    import torch
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

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, architecture)(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Norms and biases are ones and zeros as they are made: random ones show a mix-up.
                if name.endswith("norm.weight"):
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith(".bias"):
                    parameter.normal_(0.0, 0.5)
    model = model.to(getattr(torch, dtype))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    _write_tokenizer(folder, vocab)
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
