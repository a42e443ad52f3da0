"""The plan: what rank 0 broadcasts for a step, and its encoding as a flat int32 buffer.

Both ends keep, for each pipeline slot, the rows that sampled in the slot's last plan; a plan is encoded as the
difference to them. In steady decode that is one int for each sequence. Every rank applies the same plans in the
same order, so that block tables and positions never travel twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import msgspec
import numpy as np

_HEADER_INTS = 10
_STOP = 1
_SAMPLES = -1
_POOLS = -2
"""In place of the token after a chunk: it is the last of its sequence, which goes on with a drawn token, or ends."""


class LogitShaping(msgspec.Struct, frozen=True, array_like=True):
    """Changes to a row's logits that depend on the tokens before it. Semantics as vLLM documents them."""

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    """Output tokens before which `ending_token_ids` are not drawn."""
    ending_token_ids: list[int] = []
    bad_words: list[list[int]] = []
    """Token sequences that are never completed."""
    allowed_token_ids: list[int] | None = None
    """No other token is drawn."""


class PoolingKind(StrEnum):
    """What of a prompt is wanted instead of tokens after it."""

    LAST = "last"
    """The hidden state of its last token, after the final norm."""
    MEAN = "mean"
    """The mean of the hidden states of all its tokens."""
    SCORE = "score"
    """The log-probabilities of its own tokens, from one of them on."""


class Pooling(msgspec.Struct, frozen=True, array_like=True):
    """A sequence that ends with its prompt, and brings float32 numbers instead of tokens."""

    kind: PoolingKind
    normalize: bool = False
    """Of a hidden state: divided by its Euclidean length."""
    first_scored: int = 0
    """With SCORE: position of the first token whose log-probability is wanted, 1 or more."""


class SequenceParams(msgspec.Struct, frozen=True, array_like=True):
    """What the sampler must know of a sequence; travels once, when the sequence is admitted."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    choice: int
    min_p: float = 0.0
    num_logprobs: int = -1
    """Alternatives to report with each token; -1 reports nothing, 0 the token's own log-probability."""
    num_prompt_logprobs: int = -1
    """The same for each token of the prompt but the first."""
    num_prompt_tokens: int = 0
    shaping: LogitShaping | None = None
    skipped_tokens: list[int] = []
    """With `shaping`: tokens whose blocks were found in the cache, so that no chunk brings them."""
    grammar: str | None = None
    """What the output must match, as llguidance writes it."""
    output_token_ids: list[int] = []
    """With `grammar`: output tokens so far."""
    pooling: Pooling | None = None
    """Nothing is drawn for this sequence."""


@dataclass(frozen=True)
class Chunk:
    """A piece of a sequence's tokens to compute: part of a prompt, or of a replayed or preempted sequence."""

    handle: int
    start: int
    """Position of the first token."""
    token_ids: list[int]
    new_blocks: list[int]
    """Appended to the sequence's block table."""
    next_token: int | None
    """The token after the chunk; None if this is the last chunk, and it is to be drawn from the last row."""
    pools: bool = False
    """This is the last chunk, and the sequence ends with it: what was pooled is returned, nothing is drawn."""

    @property
    def samples(self) -> bool:
        return self.next_token is None and not self.pools


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, of the model's own distribution: before penalties and temperature."""

    token_id: int
    logprob: float
    rank: int
    """1 is the most likely token."""
    top_token_ids: list[int]
    top_logprobs: list[float]


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """What the sampler sends to rank 0 for a plan."""

    token_ids: list[int]
    """In the order of `StepPlan.sampling_handles`."""
    logprobs: list[TokenLogprobs | None] = []
    """As `token_ids`; empty when no sequence asked."""
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
    """By handle: of the chunk's prompt tokens, from the one after its first on."""
    pooled: dict[int, bytes] = {}
    """By handle: float32 numbers of the sequences that were pooled to their end."""


@dataclass(frozen=True)
class StepPlan:
    """One pass of the world over a batch: first the decode rows, one token each, then the chunks."""

    step: int
    slot: int
    released: list[int] = field(default_factory=list)
    """Handles that ended or were preempted; their state is dropped before anything else."""
    admitted: list[tuple[int, SequenceParams]] = field(default_factory=list)
    decode_handles: list[int] = field(default_factory=list)
    decode_tokens: list[int] = field(default_factory=list)
    """The token sampled last for each decode row: computed in this step."""
    decode_blocks: list[tuple[int, int]] = field(default_factory=list)
    """(row, block): blocks appended to the tables of decode rows."""
    chunks: list[Chunk] = field(default_factory=list)
    stop: bool = False
    """The world ends in good order; nothing is computed."""

    @property
    def sampling_handles(self) -> list[int]:
        """Handles in the order in which their tokens are sampled and returned."""
        return self.decode_handles + [chunk.handle for chunk in self.chunks if chunk.samples]

    @property
    def num_tokens(self) -> int:
        return len(self.decode_tokens) + sum(len(chunk.token_ids) for chunk in self.chunks)


class PlanCodec:
    """Encodes at rank 0, decodes at the others; one instance for each world and rank."""

    def __init__(self, num_slots: int) -> None:
        self._rows: list[list[int]] = [[] for _ in range(num_slots)]
        self._params_encoder = msgspec.msgpack.Encoder()
        self._params_decoder = msgspec.msgpack.Decoder(SequenceParams)

    def encode(self, plan: StepPlan) -> np.ndarray:
        """The plan as int32; its first element is its length."""
        previous = self._rows[plan.slot]
        if plan.decode_handles == previous:
            dropped: list[int] = []
            joined: list[int] = []
        else:
            dropped, joined = _difference(previous, plan.decode_handles)
        body = [
            *plan.released,
            *dropped,
            *joined,
            *plan.decode_tokens,
        ]
        for row, block in plan.decode_blocks:
            body += (row, block)
        for handle, params in plan.admitted:
            packed = self._params_encoder.encode(params)
            words = np.frombuffer(packed + bytes(-len(packed) % 4), dtype=np.int32)
            body += (handle, len(packed), *words.tolist())
        for chunk in plan.chunks:
            following = _POOLS if chunk.pools else _SAMPLES if chunk.next_token is None else chunk.next_token
            body += (chunk.handle, chunk.start, len(chunk.token_ids), len(chunk.new_blocks), following)
            body += chunk.new_blocks
            body += chunk.token_ids
        self._rows[plan.slot] = plan.sampling_handles
        header = [
            _HEADER_INTS + len(body),
            _STOP if plan.stop else 0,
            plan.step & 0x7FFFFFFF,
            plan.slot,
            len(plan.released),
            len(dropped),
            len(joined),
            len(plan.decode_blocks),
            len(plan.admitted),
            len(plan.chunks),
        ]
        return np.array(header + body, dtype=np.int32)

    def decode(self, encoded: np.ndarray) -> StepPlan:
        """The plan that `encode` was given."""
        ints = encoded.tolist()
        _, flags, step, slot, num_released, num_dropped, num_joined, num_blocks, num_admitted, num_chunks = (
            ints[:_HEADER_INTS]
        )
        reader = _Reader(ints, _HEADER_INTS)
        released = reader.take(num_released)
        dropped = reader.take(num_dropped)
        rows = self._rows[slot]
        if dropped:
            gone = set(dropped)
            rows = [handle for handle in rows if handle not in gone]
        decode_handles = rows + reader.take(num_joined)
        decode_tokens = reader.take(len(decode_handles))
        blocks = reader.take(2 * num_blocks)
        admitted = []
        for _ in range(num_admitted):
            handle, num_bytes = reader.take(2)
            words = np.array(reader.take((num_bytes + 3) // 4), dtype=np.int32)
            admitted.append((handle, self._params_decoder.decode(words.tobytes()[:num_bytes])))
        chunks = []
        for _ in range(num_chunks):
            handle, start, num_tokens, num_new_blocks, following = reader.take(5)
            new_blocks = reader.take(num_new_blocks)
            next_token = None if following < 0 else following
            chunks.append(
                Chunk(handle, start, reader.take(num_tokens), new_blocks, next_token, following == _POOLS)
            )
        plan = StepPlan(
            step=step,
            slot=slot,
            released=released,
            admitted=admitted,
            decode_handles=decode_handles,
            decode_tokens=decode_tokens,
            decode_blocks=list(zip(blocks[::2], blocks[1::2], strict=True)),
            chunks=chunks,
            stop=bool(flags & _STOP),
        )
        self._rows[slot] = plan.sampling_handles
        return plan


class _Reader:
    def __init__(self, ints: list[int], at: int) -> None:
        self._ints = ints
        self._at = at

    def take(self, count: int) -> list[int]:
        begin = self._at
        self._at = begin + count
        return self._ints[begin : self._at]


def _difference(previous: list[int], current: list[int]) -> tuple[list[int], list[int]]:
    """(dropped, joined) such that previous without dropped, then joined, is current.

    Rows that stay but stand in another order are dropped and join again.
    """
    keep = 0
    staying: set[int] = set()
    for handle in previous:
        if keep < len(current) and current[keep] == handle:
            staying.add(handle)
            keep += 1
    dropped = [handle for handle in previous if handle not in staying]
    return dropped, current[keep:]
