"""One request of a client that has not ended, and what it takes to submit it again. Owned by async_client.py, which
does the sending."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from gateway.errors import RequestFailed
from gateway.output_streams import Event
from gateway.protocol import Output, Submit


class Inflight:
    """A request and what it has brought."""

    __slots__ = ("cancelled", "deliver", "message", "next_position", "num_allowed", "token_ids")

    def __init__(self, deliver: Callable[[Event], None], message: Submit) -> None:
        self.deliver = deliver
        self.message = message
        self.token_ids = list(message.output_token_ids)
        self.next_position = len(self.token_ids)
        self.num_allowed = message.credit or 0
        """New tokens that the server may send in all, where it counts them."""
        self.cancelled = False

    def take(self, output: Output) -> bool:
        """Delivers what has come; or, if that is not what comes next, an error, and False."""
        if output.position != self.next_position and output.token_ids:
            text = f"the server skipped or repeated tokens: {self.next_position} was expected"
            self.deliver(RequestFailed("internal", f"{text}, {output.position} came", output.request_id))
            return False
        self.next_position += len(output.token_ids)
        self.token_ids += output.token_ids
        self.deliver(output)
        return True

    def allow(self, num_tokens: int) -> int:
        """So many new tokens may come in all; returns how many more that are than before."""
        more, self.num_allowed = num_tokens - self.num_allowed, num_tokens
        return more

    def again(self, has_credit: bool) -> Submit:
        """What submits it again, behind what it has brought. `has_credit`: the server counts."""
        message = msgspec.structs.replace(self.message, output_token_ids=list(self.token_ids))
        if message.credit is None:
            return message
        num_new = len(self.token_ids) - len(self.message.output_token_ids)
        credit = max(0, self.num_allowed - num_new) if has_credit else None
        return msgspec.structs.replace(message, credit=credit)
