"""What transformers computes for the real model: the oracle of the world tests and of the recovery tests.

Run as `python -m tests.references`; the result is kept under build/ and made again only when its inputs change.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
MODEL = "smollm2-135m-instruct"
NUM_TOKENS = 64
TEXT_TOKENS = 2048
CHAT_OPENING = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"

PROMPTS = [
    CHAT_OPENING.format("What is the capital of France?"),
    CHAT_OPENING.format("Write a short poem about the sea."),
    CHAT_OPENING.format("List three uses of a hammer, one a line."),
    CHAT_OPENING.format("Explain to a child why the sky is blue."),
    "Once upon a time, in a village by the river,",
    "def fibonacci(n):\n",
    "1, 2, 3, 4, 5, 6,",
    # Longer than the world tests' prefill chunk.
    "The phalanx was a rectangular mass military formation. " * 30 + "In short,",
]


@dataclass(frozen=True)
class References:
    prompts: list[list[int]]
    tokens: list[list[int]]
    """Greedy continuation of each prompt, NUM_TOKENS long, float32, end tokens not heeded."""
    logits: np.ndarray
    """`[prompt, NUM_TOKENS, vocab_size]` float32: what each of the tokens was chosen from."""
    text: list[int]
    text_logits: np.ndarray
    """`[TEXT_TOKENS, vocab_size]` float32 logits over `text`, as float16 (only for a coarse comparison)."""
    bfloat16_perplexity: float
    """Of transformers in bfloat16 over `text`."""


def model_folder() -> Path:
    """The real model in the model cache, imported if need be."""
    command = [
        sys.executable,
        "-m",
        "engine.models.prepare",
        MODEL,
        "--tp",
        "1",
        "--pp",
        "1",
        "--dtype",
        "auto",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    last = json.loads(done.stdout.splitlines()[-1])
    if last["event"] != "ready":
        raise RuntimeError(f"prepare failed: {last}")
    return Path(last["path"])


def load() -> References:
    """The references, computed first if they are not there."""
    folder = model_folder()
    inputs = [Path(__file__).read_bytes(), (folder / "config.json").read_bytes(), str(folder).encode()]
    key = hashlib.sha256(b"\0".join(inputs)).hexdigest()[:16]
    file = ROOT / "build" / f"references-{key}.npz"
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        _compute(folder, file)
    with np.load(file) as saved:
        return References(
            prompts=[row[row >= 0].tolist() for row in saved["prompts"]],
            tokens=saved["tokens"].tolist(),
            logits=saved["logits"],
            text=saved["text"].tolist(),
            text_logits=saved["text_logits"],
            bfloat16_perplexity=float(saved["bfloat16_perplexity"]),
        )


def perplexity(logits: np.ndarray, tokens: list[int]) -> float:
    """exp of the mean negative log-likelihood of `tokens[1:]` under `logits[:-1]`."""
    scores = logits[:-1].astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    chosen = scores[np.arange(len(tokens) - 1), tokens[1:]]
    return float(np.exp(np.mean(np.log(np.exp(scores).sum(axis=1)) - chosen)))


def _compute(folder: Path, file: Path) -> None:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see the Makefile; read when torch is imported
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in PROMPTS]
    text = tokenizer.encode((ROOT / "LICENSE").read_text(), add_special_tokens=False).ids[:TEXT_TOKENS]
    tokens, logits = [], []
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for prompt in prompts:
            ids = torch.tensor([prompt])
            whole = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
            tokens.append(whole[0, len(prompt) :].tolist())
            logits.append(model(whole[:, :-1]).logits[0, len(prompt) - 1 :].numpy())
        text_logits = model(torch.tensor([text])).logits[0].numpy()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        bfloat16_logits = model(torch.tensor([text])).logits[0].float().numpy()
    longest = max(len(prompt) for prompt in prompts)
    np.savez(
        file,
        prompts=np.array([prompt + [-1] * (longest - len(prompt)) for prompt in prompts]),
        tokens=np.array(tokens),
        logits=np.stack(logits),
        text=np.array(text),
        text_logits=text_logits.astype(np.float16),
        bfloat16_perplexity=perplexity(bfloat16_logits, text),
    )


if __name__ == "__main__":
    found = load()
    print(f"references: {len(found.prompts)} prompts, bfloat16 perplexity {found.bfloat16_perplexity:.4f}")
