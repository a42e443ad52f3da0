"""One request as rank 0 sees it: its tokens, how far they are computed, and the blocks that hold them."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from engine.plan import SequenceParams, TokenLogprobs
from engine.scheduling.kv_blocks import Digest


@dataclass(eq=False)
class Sequence:
    """A prompt and what was generated after it.

    `tokens[:num_computed]` have their keys and values in `blocks`; the rest waits to be computed.
    """

    key: tuple[bytes, str]
    """(client identity, request id): unique among the sequences that live."""
    tokens: list[int]
    num_prompt_tokens: int
    """Without tokens emitted in an earlier world: those count as output."""
    max_tokens: int
    end_token_ids: frozenset[int]
    """Tokens of the model that end the text; empty with ignore_eos."""
    stop_token_ids: frozenset[int]
    params: SequenceParams
    priority: int = 0
    """Lower comes first."""
    arrival: int = 0
    """Order of arrival, kept through preemption."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Collected until the first new token, then sent with it; None when nobody asked."""
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    digests: list[Digest] = field(default_factory=list)
    """Contents of the full blocks of `tokens`, as far as they were needed."""
    num_published: int = 0
    """Leading blocks whose content the pool knows."""
    handle: int | None = None
    """Its number inside the world while it runs; None while it waits."""
    slot: int = 0
    cancelled: bool = False
    num_cached_tokens: int | None = None
    """How many of its prompt's tokens the prefix cache had when it was admitted first."""

    @property
    def rank(self) -> tuple[int, int]:
        """Its place in the order of service: priority, then first come first served."""
        return self.priority, self.arrival

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether only the token sampled last is still to be computed."""
        return self.num_uncomputed == 1 and self.num_computed > 0 and not self.is_pooled

    @property
    def is_pooled(self) -> bool:
        """Whether it ends with its prompt: nothing is drawn."""
        return self.params.pooling is not None


def params_to_send(sequence: Sequence) -> SequenceParams:
    """What the ranks must know of a sequence that is admitted now: for the first time, or again."""
    params = sequence.params
    if params.num_prompt_logprobs >= 0 and sequence.prompt_logprobs is None:
        # They were sent with the first token; this is a sequence that comes back.
        params = msgspec.structs.replace(params, num_prompt_logprobs=-1)
    if params.shaping is not None:
        skipped = sequence.tokens[: sequence.num_computed]
        params = msgspec.structs.replace(params, skipped_tokens=skipped)
    if params.grammar is not None:
        output = sequence.tokens[sequence.num_prompt_tokens :]
        params = msgspec.structs.replace(params, output_token_ids=output)
    return params
