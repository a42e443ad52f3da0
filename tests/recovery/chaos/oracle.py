"""The oracle: what each case brings when nothing disturbs it, by transformers in float32, one sequence at a time.

Nothing of what is tested takes part: no world, no batch, no front, no replay. Of the engine it shares only what
defines an answer: the noise of a token, and the arithmetic of penalties. Computed once and kept under build/.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from tests.recovery.chaos.cases import CASES, Case
from tests.recovery.chaos.history import Expected, Oracle
from tests.references import ROOT, model_folder

BORDER_WEIGHT = 10.0
"""A drawn token's distance to the border of its interval counts so many times: float32 moves borders less than
logits."""


def load() -> Oracle:
    """The oracle of all cases; computed first, which takes minutes, if it is not there."""
    folder = model_folder()
    inputs = [Path(__file__).read_bytes(), msgspec.json.encode(CASES), str(folder).encode()]
    key = hashlib.sha256(b"\0".join(inputs)).hexdigest()[:16]
    file = ROOT / "build" / f"chaos-oracle-{key}.json"
    if not file.is_file():
        print(f"computing the oracle of {len(CASES)} cases, once", file=sys.stderr, flush=True)
        file.parent.mkdir(exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(msgspec.json.encode(_compute(folder)))
        temporary.rename(file)
    return msgspec.json.decode(file.read_bytes(), type=Oracle)


def _compute(folder: Path) -> Oracle:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see the Makefile; read when torch is imported
    import torch
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tools = _Tools(folder, model)
        return {
            case.name: [tools.answer(case, choice) for choice in range(case.num_choices)] for case in CASES
        }


class _Tools:
    """The model and its tokenizers."""

    def __init__(self, folder: Path, model: Any) -> None:
        import llguidance
        from tokenizers import Tokenizer

        self._model = model
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        ends = model.generation_config.eos_token_id
        self._end_token_ids = [ends] if isinstance(ends, int) else list(ends)
        self._vocab_size = int(model.config.vocab_size)
        self._grammar_tokenizer = llguidance.LLTokenizer(
            str(folder / "tokenizer.json"), n_vocab=self._vocab_size, eos_token=self._end_token_ids
        )

    def answer(self, case: Case, choice: int) -> Expected:
        """One choice of a case, token by token."""
        import torch

        prompt = self._tokenizer.encode(case.prompt, add_special_tokens=False).ids
        matcher = self._matcher(case)
        tokens: list[int] = []
        margins: list[float] = []
        reason, cache = "length", None
        step = torch.tensor([prompt])
        while len(tokens) < case.params.max_tokens:
            result = self._model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = result.past_key_values
            token, margin = self._choose(case, choice, result.logits[0, -1].clone(), prompt, tokens, matcher)
            tokens.append(token)
            margins.append(margin)
            step = torch.tensor([[token]])
            if token in self._end_token_ids and not case.params.ignore_eos:
                reason = "stop"
                break
            if any(stop in self._text(tokens) for stop in case.stop):
                reason = "stop"
                break
        shown = tokens[:-1] if reason == "stop" and not case.stop else tokens
        text = self._text(shown)
        for stop in case.stop:
            text = text.split(stop)[0]
        # What may be half a character is not certain yet.
        certain = [
            self._text(tokens[: index + 1]).rstrip("\N{REPLACEMENT CHARACTER}")
            for index in range(len(tokens))
        ]
        return Expected(tokens, margins, text, [min(len(part), len(text)) for part in certain], reason)

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens))

    def _matcher(self, case: Case) -> Any:
        import llguidance

        grammar = case.grammar
        if grammar is None:
            return None
        return llguidance.LLMatcher(self._grammar_tokenizer, grammar, log_level=0)

    def _choose(
        self, case: Case, choice: int, logits: Any, prompt: list[int], tokens: list[int], matcher: Any
    ) -> tuple[int, float]:
        """The next token and its margin, from logits `[vocab_size]`, which are overwritten."""
        import torch

        from engine.execution.sampling import _uniform
        from engine.execution.shaping import shape
        from engine.plan import LogitShaping

        params = case.params
        shaping = LogitShaping(
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
        )
        shape(logits, shaping, [*prompt, *tokens], len(prompt))
        if matcher is not None:
            logits[~self._allowed(matcher)] = float("-inf")
        if params.temperature == 0:
            best = torch.topk(logits, 2)
            token, margin = int(best.indices[0]), float(best.values[0] - best.values[1])
        else:
            probabilities = torch.softmax(logits / params.temperature, dim=-1)
            cumulative = torch.cumsum(probabilities.double(), dim=-1)
            target = _uniform(params.seed or 0, choice, len(prompt) + len(tokens)) * float(cumulative[-1])
            token = int(torch.searchsorted(cumulative, target, right=True))
            below = target - float(cumulative[token - 1]) if token else 1.0
            # A border behind which nothing is allowed cannot be crossed.
            margin = BORDER_WEIGHT * min(below, float(cumulative[token]) - target)
        if matcher is not None and not matcher.is_stopped():
            matcher.consume_token(token)
        return token, margin

    def _allowed(self, matcher: Any) -> Any:
        import llguidance.numpy
        import numpy as np
        import torch

        if matcher.is_stopped():
            allowed = torch.zeros(self._vocab_size, dtype=torch.bool)
            allowed[self._end_token_ids] = True
            return allowed
        mask = llguidance.numpy.allocate_token_bitmask(1, self._vocab_size)
        llguidance.numpy.fill_next_token_bitmask(matcher, mask, 0)
        bits = np.unpackbits(mask[0].view(np.uint8), bitorder="little")[: self._vocab_size]
        return torch.from_numpy(bits).bool()


if __name__ == "__main__":
    for name, choices in load().items():
        for number, found in enumerate(choices):
            close = sum(margin < 1e-3 for margin in found.margins)
            size = f"{len(found.token_ids)} tokens, {close} close, {found.finish_reason}"
            print(f"{name} [{number}]: {size}: {found.text[:60]!r}")
