"""Continuous batching with chunked prefill, over `pp` pipeline slots.

The step loop of rank 0 calls `schedule` and `complete` in turn for each slot. A sequence lives in one slot; what
the slot's last plan computed is complete before its next one is made.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Literal

from engine.plan import Chunk, PoolingKind, StepPlan, StepResult, TokenLogprobs
from engine.scheduling.kv_blocks import BlockPool, Digest, extend_digests
from engine.scheduling.pace import Pace
from engine.scheduling.sequence import Sequence, params_to_send

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class SchedulerLimits:
    max_model_len: int
    max_num_seqs: int
    """Sequences that run at the same time, over all slots."""
    max_num_batched_tokens: int
    """Tokens that one step computes at most."""


@dataclass(frozen=True)
class NewToken:
    """What a step brought for one sequence."""

    key: tuple[bytes, str]
    position: int
    """Index of the token among the sequence's output tokens."""
    token_id: int | None
    """None when the sequence was cancelled."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    """All of them, with the first token."""
    pooled: bytes | None = None
    """Float32 numbers of a sequence that was pooled; they end it."""
    num_cached_tokens: int | None = None
    """With the first token: how many of the prompt's tokens the prefix cache had."""


class Refused(Exception):
    """A request that this world can never serve. The text is for its sender."""


class Scheduler:
    """Owns all sequences of the world and the block pool."""

    def __init__(
        self, pool: BlockPool, limits: SchedulerLimits, num_slots: int, pace: Pace | None = None
    ) -> None:
        """Without a pace, chunks fill the budget whoever waits for the step."""
        self.pool = pool
        self.pace = pace
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[list[Sequence]] = [[] for _ in range(num_slots)]
        self.num_preemptions = 0
        self._by_key: dict[tuple[bytes, str], Sequence] = {}
        self._free_handles = list(range(limits.max_num_seqs - 1, -1, -1))
        self._released: list[int] = []
        """Handles to release in the next plan; they may be given out again in that same plan."""
        self._in_flight: list[list[Sequence]] = [[] for _ in range(num_slots)]
        """Sequences of the slot's outstanding plan that sample, in the order of their tokens."""
        self._pooling_in_flight: list[list[Sequence]] = [[] for _ in range(num_slots)]
        """Those that end with the plan, pooled."""
        self._busy: list[bool] = [False] * num_slots
        self._steps = count(1)
        self._arrivals = count()

    # ------------------------------------------------------------------ requests

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence in line. Raises Refused if it cannot ever be served."""
        if sequence.key in self._by_key:
            raise Refused(f"request id {sequence.key[1]!r} is already running on this connection")
        total = sequence.num_prompt_tokens + sequence.max_tokens
        if sequence.num_prompt_tokens == 0:
            raise Refused("the prompt is empty; at least one token is needed")
        asked = (
            f"prompt of {sequence.num_prompt_tokens} tokens plus max_tokens {sequence.max_tokens} is {total}"
        )
        if total > self.limits.max_model_len:
            raise Refused(f"{asked}, but the model's length is {self.limits.max_model_len}")
        capacity = self.pool.num_blocks * self.pool.block_size
        if total > capacity:
            raise Refused(
                f"{asked}, but the KV cache holds {capacity} tokens; raise --kv-cache-memory or ask for less"
            )
        sequence.arrival = next(self._arrivals)
        self._by_key[sequence.key] = sequence
        insort(self.waiting, sequence, key=_rank)

    def cancel(self, key: tuple[bytes, str]) -> NewToken | None:
        """Ends a sequence now, or when its step is complete. The answer is None if that comes later with
        `complete`, or if there is no such sequence (it may have finished a moment ago)."""
        sequence = self._by_key.get(key)
        if sequence is None or sequence.cancelled:
            return None
        sequence.cancelled = True
        if sequence.handle is not None and self._busy[sequence.slot]:
            return None
        return self._end_cancelled(sequence)

    @property
    def has_work(self) -> bool:
        return bool(self._by_key)

    @property
    def num_running(self) -> int:
        return sum(len(sequences) for sequences in self.running)

    def keys_of(self, client: bytes) -> list[tuple[bytes, str]]:
        """Every request of one client."""
        return [key for key in self._by_key if key[0] == client]

    # ------------------------------------------------------------------ steps

    def schedule(self, slot: int) -> StepPlan | None:
        """The slot's next plan: every decoding sequence, then chunks of prompts, within the token budget.

        None when the slot has nothing to compute. The slot must not be in flight.
        """
        assert not self._busy[slot]
        self._balance(slot)
        running = self.running[slot]
        budget = self.limits.max_num_batched_tokens

        planned: list[Sequence] = []
        decode_blocks: list[tuple[int, int]] = []
        for sequence in list(running):
            if sequence.handle is None or not sequence.is_decoding or budget == 0:
                continue
            if not self._make_room(sequence, 1, planned):
                continue
            if len(sequence.blocks) < self.pool.blocks_for(len(sequence.tokens)):
                block = self.pool.take(1)[0]
                sequence.blocks.append(block)
                decode_blocks.append((len(planned), block))
            planned.append(sequence)
            budget -= 1
        num_decoding = len(planned)
        budget = min(budget, self._chunk_tokens())

        chunks: list[Chunk] = []
        for sequence in list(running):
            if budget == 0:
                break
            if sequence.handle is None or sequence.is_decoding:
                continue
            length = min(sequence.num_uncomputed, budget)
            if self._make_room(sequence, length, planned):
                chunks.append(self._chunk(sequence, length))
                planned.append(sequence)
                budget -= length

        admitted = []
        while budget > 0 and self._may_admit(slot):
            sequence = self.waiting.popleft()
            handle = self._free_handles.pop()
            sequence.handle, sequence.slot = handle, slot
            running.append(sequence)
            running.sort(key=_rank)
            sequence.blocks = self.pool.share(self._shareable(sequence))
            sequence.num_computed = len(sequence.blocks) * self.pool.block_size
            if sequence.num_cached_tokens is None:  # what it finds after a preemption is its own
                sequence.num_cached_tokens = min(sequence.num_computed, sequence.num_prompt_tokens)
            admitted.append((handle, params_to_send(sequence)))
            length = min(sequence.num_uncomputed, budget)
            chunks.append(self._chunk(sequence, length, shared_blocks=sequence.blocks))
            planned.append(sequence)
            budget -= length

        if not planned:
            return None
        plan = StepPlan(
            step=next(self._steps),
            slot=slot,
            released=self._released,
            admitted=admitted,
            decode_handles=[_handle(sequence) for sequence in planned[:num_decoding]],
            decode_tokens=[sequence.tokens[-1] for sequence in planned[:num_decoding]],
            decode_blocks=decode_blocks,
            chunks=chunks,
        )
        self._released = []
        self._in_flight[slot] = planned[:num_decoding]
        for sequence in planned[:num_decoding]:
            sequence.num_computed += 1
            self._publish(sequence)
        for sequence, chunk in zip(planned[num_decoding:], chunks, strict=True):
            if chunk.samples:
                self._in_flight[slot].append(sequence)
            elif chunk.pools:
                self._pooling_in_flight[slot].append(sequence)
        self._busy[slot] = True
        return plan

    def complete(self, slot: int, result: StepResult) -> Iterator[NewToken]:
        """Takes what the slot's plan brought."""
        self._busy[slot] = False
        in_flight, self._in_flight[slot] = self._in_flight[slot], []
        for sequence in self.running[slot] if result.prompt_logprobs else ():
            if sequence.prompt_logprobs is not None and sequence.handle in result.prompt_logprobs:
                sequence.prompt_logprobs += result.prompt_logprobs[sequence.handle]
        logprobs = result.logprobs or [None] * len(in_flight)
        for sequence, token_id, token_logprobs in zip(in_flight, result.token_ids, logprobs, strict=True):
            if not sequence.cancelled:
                yield self._append(sequence, token_id, token_logprobs)
        pooled, self._pooling_in_flight[slot] = self._pooling_in_flight[slot], []
        for sequence in pooled:
            if not sequence.cancelled:
                numbers = result.pooled[_handle(sequence)]
                self._leave(sequence)
                del self._by_key[sequence.key]
                yield NewToken(sequence.key, 0, None, "stop", pooled=numbers)
        for sequence in [s for s in self.running[slot] if s.cancelled]:
            yield self._end_cancelled(sequence)

    def check_idle(self) -> None:
        """Raises RuntimeError if a world without requests holds blocks or handles."""
        if self.has_work:
            return
        handles = len(self._free_handles)
        if self.pool.num_used or handles != self.limits.max_num_seqs:
            raise RuntimeError(
                f"leak: no request is left, but {self.pool.num_used} KV blocks are held "
                f"and {handles} of {self.limits.max_num_seqs} handles are free"
            )

    # ------------------------------------------------------------------ inside

    def _chunk_tokens(self) -> int:
        """Tokens of prompts that the next plan may have at most, so that no stream waits long for it."""
        num_decoding = sum(sequence.is_decoding for sequences in self.running for sequence in sequences)
        if self.pace is None or not num_decoding:
            return self.limits.max_num_batched_tokens
        return self.pace.chunk_tokens(num_decoding, self.num_running - num_decoding + len(self.waiting))

    def _chunk(self, sequence: Sequence, length: int, shared_blocks: list[int] | None = None) -> Chunk:
        """Plans the next `length` tokens of a sequence. `shared_blocks` are those that an admitted one found."""
        start = sequence.num_computed
        fresh = self.pool.take(self.pool.blocks_for(start + length) - len(sequence.blocks))
        new_blocks = [*(shared_blocks or []), *fresh]
        sequence.blocks = sequence.blocks + fresh
        sequence.num_computed += length
        self._publish(sequence)
        return Chunk(
            handle=_handle(sequence),
            start=start,
            token_ids=sequence.tokens[start : start + length],
            new_blocks=new_blocks,
            next_token=sequence.tokens[start + length] if sequence.num_uncomputed else None,
            pools=sequence.is_pooled and not sequence.num_uncomputed,
        )

    def _shareable(self, sequence: Sequence) -> list[Digest]:
        """Digests of the full blocks of a sequence, but never all of its tokens: the last one must be computed,
        since the next is drawn from it; and none of a prompt whose log-probabilities are wanted, or the mean of
        its states. What is scored is computed too."""
        pooling = sequence.params.pooling
        if sequence.prompt_logprobs is not None or (pooling and pooling.kind is PoolingKind.MEAN):
            return []
        num_known = len(sequence.tokens) - 1
        if pooling and pooling.kind is PoolingKind.SCORE:
            num_known = pooling.first_scored - 1
        num_blocks = num_known // self.pool.block_size
        extend_digests(sequence.digests, sequence.tokens, num_blocks, self.pool.block_size)
        return sequence.digests[:num_blocks]

    def _publish(self, sequence: Sequence) -> None:
        """Offers the blocks that this step fills to others."""
        num_full = sequence.num_computed // self.pool.block_size
        extend_digests(sequence.digests, sequence.tokens, num_full, self.pool.block_size)
        for index in range(sequence.num_published, num_full):
            self.pool.publish(sequence.blocks[index], sequence.digests[index])
        sequence.num_published = num_full

    def _may_admit(self, slot: int) -> bool:
        if not self.waiting or not self._free_handles:
            return False
        # Slots fill evenly: a full one beside an empty one would leave pipeline stages without work.
        num_slots = len(self.running)
        share = -(-(self.num_running + len(self.waiting)) // num_slots)
        if len(self.running[slot]) >= share:
            return False
        # The whole of it must fit now, and one block more for each that runs: to admit a sequence only to
        # preempt it a step later would compute its prompt twice.
        candidate = self.waiting[0]
        found, kept = self.pool.peek(self._shareable(candidate))
        num_tokens = len(candidate.tokens) + (not candidate.is_pooled)
        needed = self.pool.blocks_for(num_tokens) - found + kept
        return needed <= self.pool.num_free - self._unallocated() - self.num_running

    def _unallocated(self) -> int:
        """Blocks that running sequences still need for tokens they already have."""
        return sum(
            max(0, self.pool.blocks_for(len(sequence.tokens)) - len(sequence.blocks))
            for sequences in self.running
            for sequence in sequences
        )

    def _make_room(self, sequence: Sequence, num_tokens: int, planned: list[Sequence]) -> bool:
        """Frees blocks for the next `num_tokens` of a sequence by preempting younger ones that are not in flight.

        False if that was not enough: the sequence then waits for those in flight to give blocks back, or, if
        there are none, is preempted itself. The oldest is never preempted, so there is always progress.
        """
        needed = self.pool.blocks_for(sequence.num_computed + num_tokens) - len(sequence.blocks)
        while needed > self.pool.num_free:
            victims = [
                other
                for slot, sequences in enumerate(self.running)
                if not self._busy[slot]
                for other in sequences
                if other.rank > sequence.rank and other.blocks and other not in planned
            ]
            if victims:
                self._preempt(max(victims, key=_rank))
                continue
            if not planned and not any(self._busy):
                self._preempt(sequence)
            return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a sequence's blocks; it is computed again from its tokens when there is room."""
        self._leave(sequence)
        self.num_preemptions += 1
        if sequence.prompt_logprobs:
            sequence.prompt_logprobs = []
        insort(self.waiting, sequence, key=_rank)

    def _leave(self, sequence: Sequence) -> None:
        self.running[sequence.slot].remove(sequence)
        self.pool.give_back(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = sequence.num_published = 0
        handle = _handle(sequence)
        self._released.append(handle)
        self._free_handles.append(handle)
        sequence.handle = None

    def _balance(self, slot: int) -> None:
        """Moves sequences of this slot to one that has at least two fewer."""
        while True:
            least = min(range(len(self.running)), key=lambda other: len(self.running[other]))
            if len(self.running[slot]) - len(self.running[least]) < 2:
                return
            sequence = self.running[slot].pop()
            sequence.slot = least
            self.running[least].append(sequence)
            self.running[least].sort(key=_rank)

    def _append(self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None) -> NewToken:
        position = sequence.num_output_tokens
        prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, None
        sequence.tokens.append(token_id)
        reason: FinishReason | None = None
        stop_token_id = None
        if token_id in sequence.end_token_ids:
            reason = "stop"
        elif token_id in sequence.stop_token_ids:
            reason, stop_token_id = "stop", token_id
        elif (
            sequence.num_output_tokens >= sequence.max_tokens
            or len(sequence.tokens) >= self.limits.max_model_len
        ):
            reason = "length"
        if reason is not None:
            self._leave(sequence)
            del self._by_key[sequence.key]
        return NewToken(
            sequence.key,
            position,
            token_id,
            reason,
            stop_token_id,
            logprobs,
            prompt_logprobs,
            num_cached_tokens=None if position else sequence.num_cached_tokens,
        )

    def _end_cancelled(self, sequence: Sequence) -> NewToken:
        if sequence.handle is None:
            self.waiting.remove(sequence)
        else:
            self._leave(sequence)
        del self._by_key[sequence.key]
        return NewToken(sequence.key, sequence.num_output_tokens, None, "cancelled")


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


def _handle(sequence: Sequence) -> int:
    assert sequence.handle is not None
    return sequence.handle
