"""What is known of the model's world: its limits and end tokens, also while none serves. Owned by requests.py."""

from __future__ import annotations

import asyncio

import msgspec

from gateway.journal import Journal
from gateway.protocol import ProtocolError, Welcome, decode_server_message, encode


class KnownWorld:
    """The last welcome, which the journal keeps over fronts, and those who wait for the first one."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        saved = journal.saved_welcome
        self.welcome: Welcome | None = None if saved is None else _read(saved)
        """Of the last world that served."""
        self._waiters: list[asyncio.Future[None]] = []

    async def wait(self, timeout_s: float) -> Welcome:
        """What is known; waits for it. Raises TimeoutError."""
        if self.welcome is None:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                async with asyncio.timeout(timeout_s):
                    await waiter
            finally:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
        assert self.welcome is not None
        return self.welcome

    def note(self, welcome: Welcome) -> None:
        """A world serves."""
        self.welcome = welcome
        self._journal.save_welcome(encode(msgspec.structs.replace(welcome, epoch=0)))
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


def _read(saved: bytes) -> Welcome | None:
    """What an earlier front knew of its world; None if this version cannot read it."""
    try:
        message = decode_server_message(saved)
    except ProtocolError:
        return None
    return message if isinstance(message, Welcome) else None
