"""Structured output: which tokens a sequence's grammar allows next.

Lives at the sampler. A grammar's state is rebuilt from the output tokens, so that it survives preemption and the
world. Grammars are those of llguidance (Lark, or its JSON form for schemas); the front makes and checks them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llguidance
import llguidance.numpy
import numpy as np
import torch

from engine.plan import StepPlan

MAX_PREPARED = 32
"""Grammars that are kept beyond the sequences that have them."""


SHORT_GRAMMAR = 4096
COMPILE_STACK_BYTES = 256 * 1024 * 1024
"""Memory is taken as it is used: a grammar of 5,000 rules, one in the other, takes less than 64 MiB."""


class GrammarError(Exception):
    """A grammar that cannot be used. The text says where it is wrong."""


class Grammars:
    """The tokenizer that grammars are matched against, and the states of the sequences that have one."""

    def __init__(self, tokenizer_file: Path, vocab_size: int, end_token_ids: tuple[int, ...]) -> None:
        self._vocab_size = vocab_size
        self._end_token_ids = list(end_token_ids)
        self._tokenizer_file = tokenizer_file
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._matchers: dict[int, llguidance.LLMatcher] = {}
        self._prepared: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        """At their beginnings, least recently used first: a copy costs nothing, preparing one milliseconds."""
        self._mask = llguidance.numpy.allocate_token_bitmask(1, vocab_size)
        # For each byte of a mask what is added to its eight logits: one pass over a row, and no temporaries.
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        self._penalties = np.where(bits == 1, 0.0, -np.inf).astype(np.float32)
        self._row = np.empty((self._mask.nbytes, 8), dtype=np.float32)
        self.on_progress: Callable[[], None] = lambda: None
        """Called after each piece of work: many grammars at once may take longer than a step that hangs would."""
        # Building the tokenizer's tree takes 0.3 s: beside the loading of weights, not in the first such step.
        self._builder = threading.Thread(target=self._build, name="grammar-tokenizer", daemon=True)
        self._builder.start()

    def check(self, grammar: str) -> None:
        """Raises GrammarError for a grammar that this model cannot follow."""
        problem = llguidance.LLMatcher.validate_grammar(grammar, self._wait())
        if problem and not problem.startswith("WARNING"):
            raise GrammarError(f"the grammar is not valid: {problem}")

    def apply(self, plan: StepPlan) -> None:
        """Forgets the states of released sequences and makes those of admitted ones."""
        for handle in plan.released:
            self._matchers.pop(handle, None)
        for handle, params in plan.admitted:
            if params.grammar is not None:
                matcher = self._prepare(params.grammar).deep_copy()
                matcher.consume_tokens(params.output_token_ids)
                self._matchers[handle] = matcher
                self.on_progress()

    def constrain(self, logits: torch.Tensor, handle: int) -> None:
        """Sets what the sequence's grammar forbids to -inf, in its row of logits `[vocab_size]`."""
        matcher = self._matchers.get(handle)
        if matcher is None:
            return
        if matcher.is_error() or matcher.is_stopped():
            # Complete, or too complex to go on with: nothing but the end may follow.
            penalty = torch.full((self._vocab_size,), -torch.inf)
            penalty[self._end_token_ids] = 0.0
        else:
            llguidance.numpy.fill_next_token_bitmask(matcher, self._mask, 0)
            np.take(self._penalties, self._mask[0].view(np.uint8), axis=0, out=self._row, mode="clip")
            penalty = torch.from_numpy(self._row).view(-1)[: self._vocab_size]
        penalty = penalty.to(logits.device)
        logits.add_(penalty)
        if logits.max() == -torch.inf:
            # A minimum length or bad words forbade all that the grammar allows; the grammar is the stronger promise.
            logits.copy_(penalty)
        self.on_progress()

    def advance(self, handle: int, token_id: int) -> None:
        """Notes the token that was drawn."""
        matcher = self._matchers.get(handle)
        if matcher is not None and not matcher.is_stopped():
            matcher.consume_token(token_id)

    def _prepare(self, grammar: str) -> llguidance.LLMatcher:
        """The grammar at its beginning, not to be changed."""
        matcher = self._prepared.get(grammar)
        if matcher is None:
            matcher = self._prepared[grammar] = self._compile(grammar)
            if len(self._prepared) > MAX_PREPARED:
                self._prepared.popitem(last=False)
        self._prepared.move_to_end(grammar)
        return matcher

    def _compile(self, grammar: str) -> llguidance.LLMatcher:
        """llguidance follows rules recursively, and an overflow of the stack would end the world: what is long
        enough for that is compiled on a stack that suffices for every grammar that rank 0 takes."""
        tokenizer = self._wait()
        if len(grammar) <= SHORT_GRAMMAR:
            return llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        before = threading.stack_size(COMPILE_STACK_BYTES)
        try:
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(llguidance.LLMatcher, tokenizer, grammar, log_level=0).result()
        finally:
            threading.stack_size(before)

    def _build(self) -> None:
        self._tokenizer = llguidance.LLTokenizer(
            str(self._tokenizer_file), n_vocab=self._vocab_size, eos_token=self._end_token_ids
        )

    def _wait(self) -> llguidance.LLTokenizer:
        self._builder.join()
        if self._tokenizer is None:
            raise GrammarError(
                f"structured output needs a tokenizer, and {self._tokenizer_file} cannot be read"
            )
        return self._tokenizer
