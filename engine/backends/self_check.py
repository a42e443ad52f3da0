"""Proves at start that a cut model over the paged cache computes what the whole one does in transformers.

Called by `loading`. DeepSpeed finds out by names how a model is to be cut, and models of transformers may ignore what
they are not told of: where either goes wrong, nothing fails, the text is only worse. So the sampler's rank runs two
short sequences through the whole model first, and then all ranks run them through the cut one, chunked, batched and
decoded as a world does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.backends.model_facts import HuggingFaceModel
from engine.execution.batch import SequenceTable
from engine.execution.kv_cache import BLOCK_SIZE, KVCache
from engine.execution.stage import Stage, StageRunner
from engine.models.errors import ModelError
from engine.plan import Chunk, SequenceParams, StepPlan
from engine.world import World

TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.25}
"""Mean difference of the logits, as a share of their standard deviation. A wrong cut or mask makes it 1 and more;
rounding makes it a hundredth in bfloat16."""

_LENGTH = 24
_LONGEST_WINDOW = 256
"""Windows up to this are crossed by the longer sequence."""

_PARAMS = SequenceParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, choice=0)


@dataclass(frozen=True)
class Reference:
    """What the whole model says after the last tokens of two sequences."""

    logits: torch.Tensor
    """`[3, vocab_size]` float32, in the order in which `compare` samples."""


def sequences(facts: HuggingFaceModel) -> tuple[list[int], list[int]]:
    """Two sequences of random tokens, the first longer than the model's window."""
    window = facts.window or 0
    longer = _LENGTH + (window if window <= _LONGEST_WINDOW else 0)
    longer = min(longer, facts.max_model_len)
    tokens = np.random.default_rng(0).integers(0, facts.vocab_size, longer + 9).tolist()
    return tokens[:longer], tokens[longer:]


def compute_reference(model: Any, first: list[int], second: list[int]) -> Reference:
    """Runs the whole model as it is: its own attention, its own masks, no cache."""
    logits = [
        model(torch.tensor([tokens], device=model.device), use_cache=False).logits[0, -1].float()
        for tokens in (first, second[:-1], second)
    ]
    return Reference(torch.stack(logits).cpu())


def compare(
    world: World,
    stage: Stage,
    cache: KVCache,
    widths: list[int],
    dtype: torch.dtype,
    first: list[int],
    second: list[int],
    reference: Reference | None,
) -> None:
    """Runs the sequences through the cut model. Every rank calls it; the one with the reference raises ModelError."""
    blocks = -(-len(first) // BLOCK_SIZE)
    table = SequenceTable(2, len(first) + len(second), BLOCK_SIZE, stage.device)
    runner = StageRunner(world, stage, cache, table, 0, widths, None)
    cut = len(first) // 2
    plans = [
        StepPlan(1, 0, admitted=[(0, _PARAMS)], chunks=[
            Chunk(0, 0, first[:cut], list(range(1, blocks + 1)), first[cut]),
        ]),
        StepPlan(2, 0, admitted=[(1, _PARAMS)], chunks=[
            Chunk(0, cut, first[cut:-1], [], first[-1]),
            Chunk(1, 0, second[:-1], [0], None),
        ]),
        StepPlan(3, 0, decode_handles=[0, 1], decode_tokens=[first[-1], second[-1]]),
    ]  # fmt: skip
    found = []
    for plan in plans:
        batch = table.apply(plan)
        hidden = runner.forward(batch, plan.step)
        assert hidden is not None
        logits = runner.logits(hidden, batch.sampling_rows)
        if logits is not None:
            found.append(logits)
    if reference is None:
        return
    # Sampled in steps 2 and 3: the second sequence's chunk, then both of them.
    chunk, first_row, second_row = torch.cat(found).cpu()
    error = _error(torch.stack([first_row, chunk, second_row]), reference.logits)
    if not error < TOLERANCE[dtype]:
        raise ModelError(
            f"--backend deepspeed with --tp {world.at.tp} computes something else than the whole model does in "
            f"transformers: the logits differ by {error:.3f} of their spread on average, and "
            f"{TOLERANCE[dtype]} is allowed; "
            + ("try --tp 1" if world.at.tp > 1 else "this model cannot be served")
        )


def cache_blocks(first: list[int]) -> int:
    """Blocks that `compare` needs."""
    return 1 + -(-len(first) // BLOCK_SIZE)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    spread = float(expected.std()) or 1.0
    return float((found - expected).abs().mean()) / spread
