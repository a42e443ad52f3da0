"""A request's outputs as one client reads them, from a place on.

For clients that come to a request that runs already or has ended, over HTTP or ZeroMQ. What is read after so many
tokens depends on the tokens alone, never on how they were cut into outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from gateway.detokenizer import TextStream
from gateway.journal import JournalEntry
from gateway.live_request import read_text
from gateway.protocol import Output


def whole_output(entry: JournalEntry) -> Output:
    """Everything that a request has brought so far, as one output without text."""
    return Output(
        entry.request_id,
        entry.num_given,
        entry.output_token_ids[entry.num_given :],
        entry.finish_reason,
        entry.stop_reason,
        None,
        list(entry.logprobs) if entry.params.logprobs is not None else None,
        entry.prompt_logprobs,
        num_cached_tokens=entry.num_cached_tokens,
    )


class TextReader:
    """Makes the text of one request anew. Outputs have to come in order, from the first on."""

    def __init__(
        self, entry: JournalEntry, text: TextStream, eos_token_ids: Sequence[int], num_known: int
    ) -> None:
        """`num_known`: output tokens that the client has, those that it gave itself counted."""
        self._entry = entry
        self._text = text
        self._eos_token_ids = eos_token_ids
        self._num_known = num_known
        for token_id in entry.output_token_ids[: entry.num_given]:
            text.push(token_id)

    def read(self, output: Output) -> Iterator[tuple[bool, Output]]:
        """An output with its text, in one or two parts, each with whether it is new to the client. The text of the
        second part is made when it is asked for."""
        end = output.position + len(output.token_ids)
        if output.position >= self._num_known:
            yield True, self._shown(output)
        elif end <= self._num_known and output.finish_reason is None:
            yield False, self._shown(output)
        elif end < self._num_known:  # it ended before where the client has been
            shown = self._shown(output)
            yield True, msgspec.structs.replace(shown, position=end, token_ids=[], text="", logprobs=None)
        else:
            count = self._num_known - output.position
            known = msgspec.structs.replace(
                output,
                token_ids=output.token_ids[:count],
                finish_reason=None,
                stop_reason=None,
                logprobs=output.logprobs and output.logprobs[:count],
            )
            yield False, self._shown(known)
            new = msgspec.structs.replace(
                output,
                position=self._num_known,
                token_ids=output.token_ids[count:],
                logprobs=output.logprobs and output.logprobs[count:],
            )
            yield True, self._shown(new)

    def _shown(self, output: Output) -> Output:
        return read_text(self._text, self._entry, output, self._eos_token_ids)
