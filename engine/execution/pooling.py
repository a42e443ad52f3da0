"""What pooled sequences have brought so far: sums of hidden states, and scores of tokens.

One instance at the sampling rank, used by its stage runner. It begins anew with a sequence that is computed again.
"""

from __future__ import annotations

from array import array

import numpy as np
import torch

from engine.execution.batch import PooledRows
from engine.plan import PoolingKind, StepPlan


class Pooler:
    """By handle, as far as its sequence is computed."""

    def __init__(self) -> None:
        self._states: dict[int, torch.Tensor] = {}
        """Float64 `[hidden_size]`: a sum over tokens, or the last one's state."""
        self._counts: dict[int, int] = {}
        self._scores: dict[int, array[float]] = {}

    def apply(self, plan: StepPlan) -> None:
        """Forgets what released sequences have brought."""
        if self._states or self._scores:
            for handle in plan.released:
                self._forget(handle)

    def add_states(self, rows: PooledRows, states: torch.Tensor) -> None:
        """Takes hidden states after the final norm, `[num_rows, hidden_size]` float32, of a chunk."""
        handle = rows.handle
        total = states.double().sum(dim=0)
        if rows.pooling.kind is PoolingKind.MEAN and handle in self._states:
            total += self._states[handle]
            self._counts[handle] += len(states)
        else:
            self._counts[handle] = len(states)
        self._states[handle] = total

    def add_scores(self, handle: int, logits: torch.Tensor, token_ids: list[int]) -> None:
        """Takes the log-probability of a token from each row of logits `[num_rows, vocab_size]` float32."""
        chosen = torch.tensor(token_ids, device=logits.device).unsqueeze(1)
        logprobs = logits.gather(1, chosen).squeeze(1) - torch.logsumexp(logits, dim=-1)
        self._scores.setdefault(handle, array("f")).extend(logprobs.tolist())

    def finish(self, rows: PooledRows) -> bytes:
        """The numbers of a sequence whose last chunk has come, as float32 in little-endian order; it is forgotten."""
        handle = rows.handle
        if rows.pooling.kind is PoolingKind.SCORE:
            numbers = np.array(self._scores.get(handle, ()), dtype="<f4")
        else:
            state = (self._states[handle] / self._counts[handle]).cpu().numpy()
            if rows.pooling.normalize:
                state /= max(float(np.linalg.norm(state)), 1e-12)
            numbers = state.astype("<f4")
        self._forget(handle)
        return numbers.tobytes()

    def _forget(self, handle: int) -> None:
        self._states.pop(handle, None)
        self._counts.pop(handle, None)
        self._scores.pop(handle, None)
