"""What transformers computes of whole prompts for the real model: hidden states and scores, the oracle of pooling.

Run as `python -m tests.pooling_references`; the result is kept under build/ and made again only when its inputs
change. Ranks call `load`, which imports no transformers once it is there.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests import references

ROOT = Path(__file__).parents[1]
TEXT_TOKENS = 600


@dataclass(frozen=True)
class PoolingReference:
    """Of one prompt, float32."""

    prompt: list[int]
    last: np.ndarray
    """`[hidden_size]`: the last token's state after the final norm."""
    mean: np.ndarray
    """`[hidden_size]`: the mean of all tokens' states after the final norm."""
    scores: np.ndarray
    """`[len(prompt) - 1]`: the log-probability of each token but the first."""

    def normalized(self, kind: str) -> np.ndarray:
        state = (self.last if kind == "last" else self.mean).astype(np.float64)
        return np.asarray(state / np.sqrt((state**2).sum()))


def load() -> list[PoolingReference]:
    """The references, of a long text and of the prompts of `references`; computed first if they are not there."""
    known = references.load()
    prompts = [known.text[:TEXT_TOKENS], *known.prompts]
    inputs = [Path(__file__).read_bytes(), Path(references.__file__).read_bytes()]
    key = hashlib.sha256(b"\0".join(inputs)).hexdigest()[:16]
    file = ROOT / "build" / f"pooling-{key}.npz"
    if not file.is_file():
        _compute(prompts, file)
    with np.load(file) as saved:
        return [
            PoolingReference(prompt, saved["last"][row], saved["mean"][row], saved[f"scores{row}"])
            for row, prompt in enumerate(prompts)
        ]


def _compute(prompts: list[list[int]], file: Path) -> None:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see the Makefile; read when torch is imported
    import torch
    from transformers import AutoModelForCausalLM

    last, mean, scores = [], [], {}
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(references.model_folder(), dtype=torch.float32)
        for row, prompt in enumerate(prompts):
            found = model(torch.tensor([prompt]), output_hidden_states=True, use_cache=False)
            states = found.hidden_states[-1][0]
            last.append(states[-1].numpy())
            mean.append(states.mean(dim=0).numpy())
            logprobs = torch.log_softmax(found.logits[0, :-1], dim=-1)
            scores[f"scores{row}"] = logprobs.gather(1, torch.tensor(prompt[1:]).unsqueeze(1))[:, 0].numpy()
    np.savez(file, last=np.stack(last), mean=np.stack(mean), **scores)


if __name__ == "__main__":
    print(f"pooling references: {len(load())} prompts")
