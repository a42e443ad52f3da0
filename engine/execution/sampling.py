"""From logits to tokens, at the last stage's first rank.

The noise of a token is keyed by (seed, choice, absolute position): it depends on the request alone, never on
batch mates, on the world, or on how often the position was computed.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.plan import SequenceParams


def sample(logits: torch.Tensor, params: list[SequenceParams], positions: list[int]) -> list[int]:
    """One token id for each row.

    logits `[num_rows, vocab_size]` float32 (overwritten); `positions[i]` is the absolute position of the token
    drawn from row i.
    """
    tokens: list[int] = torch.argmax(logits, dim=-1).tolist()
    drawn = [row for row, row_params in enumerate(params) if row_params.temperature > 0]
    if not drawn:
        return tokens
    rows = logits if len(drawn) == len(params) else logits[torch.tensor(drawn, device=logits.device)]
    of_rows = [params[row] for row in drawn]
    rows.div_(torch.tensor([p.temperature for p in of_rows], device=rows.device).unsqueeze(1))
    _keep_top_k(rows, [p.top_k for p in of_rows])
    probabilities = torch.softmax(rows, dim=-1)
    _keep_min_p(probabilities, [p.min_p for p in of_rows])
    _keep_top_p(probabilities, [p.top_p for p in of_rows])
    uniform = [_uniform(p.seed, p.choice, positions[row]) for p, row in zip(of_rows, drawn, strict=True)]
    # Inverse transform in token order: a change in the last bits of the logits moves the borders of the
    # intervals by as little, whatever the other tokens do. In float64, so that the sum itself adds nothing.
    cumulative = torch.cumsum(probabilities.double(), dim=-1)
    targets = torch.tensor(uniform, dtype=torch.float64, device=rows.device).unsqueeze(1) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, targets, right=True).squeeze(1).clamp_(max=rows.shape[1] - 1)
    for row, token in zip(drawn, chosen.tolist(), strict=True):
        tokens[row] = token
    return tokens


def _uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) from a counter-based generator (Philox, Salmon et al. 2011): key (seed, choice), counter
    position. The same on every machine."""
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, choice], dtype=np.uint64)
    raw = np.random.Philox(key=key, counter=position).random_raw()
    return float(int(raw) >> 11) * 2.0**-53


def _keep_top_k(logits: torch.Tensor, top_k: list[int]) -> None:
    """Sets all but the k largest logits of a row to -inf, in place; ties with the k-th stay; 0 keeps all."""
    for row, k in enumerate(top_k):
        if 0 < k < logits.shape[1]:
            threshold = torch.topk(logits[row], k).values[-1]
            logits[row].masked_fill_(logits[row] < threshold, float("-inf"))


def _keep_min_p(probabilities: torch.Tensor, min_p: list[float]) -> None:
    """Sets to zero, in place, what is less likely than min_p times the most likely token (arXiv 2407.01082)."""
    for row, p in enumerate(min_p):
        if p > 0.0:
            threshold = p * probabilities[row].max()
            probabilities[row].masked_fill_(probabilities[row] < threshold, 0.0)


def _keep_top_p(probabilities: torch.Tensor, top_p: list[float]) -> None:
    """Sets to zero, in place, what lies outside the smallest set of most likely tokens whose probability reaches
    p (nucleus sampling, arXiv 1904.09751); ties with its last member stay."""
    for row, p in enumerate(top_p):
        if p < 1.0:
            ordered = torch.sort(probabilities[row], descending=True).values
            reached = torch.cumsum(ordered.double(), dim=0)
            last = int(torch.searchsorted(reached, p * float(reached[-1])))
            threshold = ordered[min(last, len(ordered) - 1)]
            probabilities[row].masked_fill_(probabilities[row] < threshold, 0.0)
