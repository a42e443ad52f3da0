"""Log-probabilities as clients ask for them: the token's own, its rank, and the most likely alternatives.

Called at the sampler with the model's own logits, before anything is changed in them.
"""

from __future__ import annotations

import torch

from engine.plan import TokenLogprobs


def token_logprobs(logits: torch.Tensor, token_ids: list[int], num_top: list[int]) -> list[TokenLogprobs]:
    """For each row of `logits` `[num_rows, vocab_size]` float32: its token's entry with `num_top[row]`
    alternatives."""
    if not token_ids:
        return []
    scores = torch.log_softmax(logits, dim=-1)
    chosen = scores.gather(1, torch.tensor(token_ids, device=logits.device).unsqueeze(1))
    ranks = ((scores > chosen).sum(dim=1) + 1).tolist()
    widest = max(num_top)
    top = scores.topk(min(widest, scores.shape[1]), dim=1) if widest else None
    top_ids = top.indices.tolist() if top else [[]] * len(token_ids)
    top_scores = top.values.tolist() if top else [[]] * len(token_ids)
    return [
        TokenLogprobs(token, score, rank, ids[:count], alternatives[:count])
        for token, score, rank, ids, alternatives, count in zip(
            token_ids, chosen.squeeze(1).tolist(), ranks, top_ids, top_scores, num_top, strict=True
        )
    ]
