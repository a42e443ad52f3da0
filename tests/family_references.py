"""What transformers computes for small random models of every family: the oracle of tests/world/test_families.py.

Run as `python -m tests.family_references`; models and results are kept under build/ and made again only when
their inputs change. Ranks call `load`, which imports no transformers once they are there.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests import tiny_models

ROOT = Path(__file__).parents[1]
PROMPT_LENGTHS = (75, 9)
"""Of the first prompt, longer than two chunks and than every window, and of one that runs beside it."""
NUM_TOKENS = 12


@dataclass(frozen=True)
class FamilyReference:
    folder: Path
    prompts: list[list[int]]
    tokens: list[list[int]]
    """Greedy continuation of each prompt, NUM_TOKENS long, float32, end tokens not heeded."""
    logits: np.ndarray
    """`[prompt, NUM_TOKENS, vocab_size]` float32: what each of the tokens was chosen from."""


def load() -> dict[str, FamilyReference]:
    """The reference of each family by its name, computed first if it is not there."""
    return {name: _load(name) for name in tiny_models.TINY_FAMILIES}


def _load(name: str) -> FamilyReference:
    inputs = [Path(__file__).read_bytes(), Path(tiny_models.__file__).read_bytes()]
    key = hashlib.sha256(b"\0".join(inputs)).hexdigest()[:16]
    folder = ROOT / "build" / f"families-{key}" / name
    file = folder / "references.npz"
    if not file.is_file():
        compute(tiny_models.make_tiny_family(folder, name), file)
    return read(folder, file)


def read(folder: Path, file: Path) -> FamilyReference:
    """What `compute` wrote."""
    with np.load(file) as saved:
        prompts = [row[row >= 0].tolist() for row in saved["prompts"]]
        return FamilyReference(folder, prompts, saved["tokens"].tolist(), saved["logits"])


def compute(folder: Path, file: Path) -> None:
    """Writes to `file` what transformers computes for the model in `folder`."""
    import torch
    from transformers import AutoModelForCausalLM

    # Its own attention: that of torch knows no soft caps.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    vocab_size = model.config.vocab_size
    random = np.random.default_rng(0)
    prompts = [random.integers(3, vocab_size, length).tolist() for length in PROMPT_LENGTHS]
    tokens, logits = [], []
    with torch.inference_mode():
        for prompt in prompts:
            whole = list(prompt)
            for _ in range(NUM_TOKENS):
                # No cache: nothing but the model's own formula.
                whole.append(int(model(torch.tensor([whole]), use_cache=False).logits[0, -1].argmax()))
            tokens.append(whole[len(prompt) :])
            found = model(torch.tensor([whole[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
            logits.append(found.numpy())
    longest = max(PROMPT_LENGTHS)
    np.savez(
        file,
        prompts=np.array([prompt + [-1] * (longest - len(prompt)) for prompt in prompts]),
        tokens=np.array(tokens),
        logits=np.stack(logits),
    )


if __name__ == "__main__":
    for name, reference in load().items():
        gaps = np.sort(reference.logits, axis=-1)
        print(
            f"{name}: logits up to {np.abs(reference.logits).max():.1f}, closest first and second "
            f"{(gaps[..., -1] - gaps[..., -2]).min():.4f}"
        )
