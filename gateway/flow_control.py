"""Credit-based flow control: what of a request a slow client has been sent, and what waits until it asks for more.

Used by zmq_server.py. What waits is in the journal anyway: nothing is kept twice, and no queue grows.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, TypeVar

from gateway.journal import JournalEntry
from gateway.protocol import Output, SamplingParams
from gateway.reading import TextReader
from gateway.text import TextModel

_MOST = 2**40
_T = TypeVar("_T", bound=Hashable)


class Window:
    """How much of one request its client can take."""

    def __init__(self, credit: int, num_sent: int) -> None:
        """`credit`: output tokens that may be sent. `num_sent`: output tokens that the client has already."""
        self.num_sent = num_sent
        self._credit = credit
        self._reader: TextReader | None = None

    def grant(self, tokens: int) -> None:
        self._credit = min(self._credit + tokens, _MOST)

    def take(self, output: Output) -> Output | None:
        """The output itself if all of it may be sent now and nothing waits before it; else None: `more` has what
        may be sent."""
        count = len(output.token_ids)
        behind = self._reader is not None or output.position != self.num_sent
        if behind or count > self._credit:
            return None
        self._credit -= count
        self.num_sent += count
        return output

    def more(self, entry: JournalEntry, text: TextModel, eos_token_ids: Sequence[int]) -> Iterator[Output]:
        """What may be sent now of what has been made, and the end once everything before it was sent."""
        made = len(entry.output_token_ids)
        count = max(0, min(self._credit, made - self.num_sent))
        is_last = entry.ended and self.num_sent + count >= made
        if not count and not is_last:
            return
        if self._reader is None:
            stream = text.stream(entry.stop, entry.prompt_token_ids)
            self._reader = TextReader(entry, stream, eos_token_ids, self.num_sent)
            # The text behind the tokens that were sent begins where their text ended.
            for _ in self._reader.read(_piece(entry, entry.num_given, self.num_sent, False)):
                pass
        piece = _piece(entry, self.num_sent, self.num_sent + count, is_last)
        self._credit -= count
        self.num_sent += count
        for is_new, shown in self._reader.read(piece):
            if is_new:
                yield shown


class UnreadTokens(Generic[_T]):
    """Tokens of requests that have ended and are not read to their ends, so that there is a bound on them. With
    log-probabilities a token counts for many: see `weight`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._of: dict[_T, int] = {}
        self._total = 0

    def add(self, owner: _T, tokens: int) -> None:
        """`owner` keeps so many; what it kept before is forgotten, its place in the order is not."""
        self._total += tokens - self._of.get(owner, 0)
        self._of[owner] = tokens

    def remove(self, owner: _T) -> None:
        self._total -= self._of.pop(owner, 0)

    def take_excess(self) -> list[_T]:
        """Those who have to give way, the oldest first."""
        excess = []
        while self._total > self._most:
            oldest = next(iter(self._of))
            self.remove(oldest)
            excess.append(oldest)
        return excess


def weight(params: SamplingParams) -> int:
    """What a token of a request takes of the front's memory, in tokens without log-probabilities (some 40 bytes)."""
    return 1 if params.logprobs is None else 8 + 2 * params.logprobs


def _piece(entry: JournalEntry, begin: int, end: int, is_last: bool) -> Output:
    """Tokens of a request, without text. Those that were given have no log-probabilities."""
    first = begin - entry.num_given
    return Output(
        entry.request_id,
        begin,
        entry.output_token_ids[begin:end],
        entry.finish_reason if is_last else None,
        entry.stop_reason if is_last else None,
        None,
        entry.logprobs[first : first + end - begin] if entry.params.logprobs is not None else None,
        entry.prompt_logprobs if begin == entry.num_given else None,
        num_cached_tokens=entry.num_cached_tokens if begin == entry.num_given else None,
    )
