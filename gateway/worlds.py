"""The front's view of the worlds: the supervisor's table, and the link to the world that serves.

Fed by control.py. It decides which world is the active one and keeps one connection to its gateway; what
happens to requests is for requests.py to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from gateway.connection import Connection
from gateway.control_messages import WorldEntry, WorldTable
from gateway.errors import EndpointError
from gateway.log import Logger
from gateway.protocol import Cancel, ServerMessage, Submit, Welcome
from gateway.requests import Requests
from gateway.sockets import Socket

SILENCE_S = 60.0
"""Rank 0 answers between steps only, and the supervisor watches it far more closely: this is the last
resort."""

FIRST_RETRY_S = 0.05
LAST_RETRY_S = 1.0


class Link:
    """The connection to one world's gateway."""

    def __init__(self, entry: WorldEntry, open_connection: Callable[[Link], Connection]) -> None:
        self.entry = entry
        self.is_up = False
        self._connection = open_connection(self)

    @property
    def welcome(self) -> Welcome | None:
        return self._connection.welcome

    def send(self, message: Submit | Cancel) -> None:
        """Never raises: if the link is gone, its loss was or will be reported, and everything is sent
        again."""
        self._connection.send_soon(message)

    def close(self) -> None:
        self.is_up = False
        self._connection.close()


class Worlds:
    """Follows the table: links to the active world, and tells `requests` when it serves and when it ended."""

    def __init__(
        self,
        context: zmq.Context[Socket],
        requests: Requests,
        log: Logger,
        on_serving_changed: Callable[[], None],
    ) -> None:
        self.table: WorldTable | None = None
        self.table_at = 0.0
        """When the table came, CLOCK_MONOTONIC."""
        self._context = context
        self._requests = requests
        self._log = log
        self._on_serving_changed = on_serving_changed
        self._link: Link | None = None
        self._next_link: Link | None = None
        """To a younger world, which takes over from one that serves as soon as it has welcomed us."""
        self._retry: asyncio.TimerHandle | None = None
        self._retry_s = FIRST_RETRY_S
        self._retry_epoch = 0
        self._served_until: float | None = None
        """When the last world was lost, CLOCK_MONOTONIC; None before."""

    @property
    def serving_epoch(self) -> int | None:
        """Epoch of the world whose gateway has welcomed us."""
        return self._link.entry.epoch if self._link is not None and self._link.is_up else None

    def update(self, table: WorldTable) -> None:
        """A new table from the supervisor."""
        if self.table is not None and table.epoch < self.table.epoch:
            self._log.warning("old world table dropped", epoch=table.epoch, known=self.table.epoch)
            return
        self.table = table
        self.table_at = time.monotonic()
        self._requests.judge(table.faults)
        active = self._active()
        if self._link is not None:
            linked = self._link.entry
            if active is not None and (active.epoch, active.gateway) == (linked.epoch, linked.gateway):
                self._drop_next_link()
                return
            if active is not None and self._link.is_up and _lists(table, linked):
                self._prepare_change(active)
                return
            self._drop_link("the world is not active any more")
        self._drop_next_link()
        self._requests.judge(table.faults)
        if active is None or (self._retry is not None and active.epoch == self._retry_epoch):
            return
        self._cancel_retry()
        self._retry_s = FIRST_RETRY_S
        self._open(active)

    def close(self) -> None:
        self._cancel_retry()
        self._drop_next_link()
        if self._link is not None:
            self._link.close()

    @property
    def outage_s(self) -> float | None:
        """How long no world has served; 0 while one does, None before the first."""
        if self.serving_epoch is not None:
            return 0.0
        return None if self._served_until is None else time.monotonic() - self._served_until

    def why_not_ready(self) -> str | None:
        """One sentence for a person; None while a world serves."""
        if self.serving_epoch is not None:
            return None
        if self.table is None:
            return "the supervisor has not spoken yet"
        notice = f"; {self.table.notice}" if self.table.notice else ""
        coming = [world for world in self.table.worlds if world.state in ("active", "starting")]
        if not coming:
            return f"no world is there; the next one has not started yet{notice}"
        world = coming[0]
        if world.state == "active":
            return f"world {world.epoch} is active; its gateway has not answered yet{notice}"
        phases = sorted({rank.state for rank in world.ranks})
        doing = f" ({', '.join(phases)})" if phases else ""
        return f"world {world.epoch} is starting{doing}{notice}"

    def describe(self) -> dict[str, Any]:
        """What `/cluster` shows."""
        table = self.table
        if table is None:
            return {
                "epoch": 0,
                "serving_epoch": None,
                "worlds": [],
                "faults": [],
                "notice": None,
                "asked": {"tp": None, "pp": None},
                "hosts": [],
                "table_age_s": None,
            }
        age_s = time.monotonic() - self.table_at
        order = {"active": 0, "starting": 1, "spare": 2}
        worlds: list[dict[str, Any]] = [
            msgspec.to_builtins(world)
            for world in sorted(table.worlds, key=lambda world: order.get(world.state, 3))
        ]
        for world in worlds:
            for rank in world["ranks"]:
                rank["heartbeat_age_s"] = round(rank["heartbeat_age_s"] + age_s, 3)
        return {
            "epoch": table.epoch,
            "serving_epoch": self.serving_epoch,
            "worlds": worlds,
            "faults": msgspec.to_builtins(table.faults),
            "notice": table.notice,
            "asked": {"tp": table.tp, "pp": table.pp},
            "hosts": msgspec.to_builtins(table.hosts),
            "table_age_s": round(age_s, 3),
        }

    # ----------------------------------------------------------------------- inside

    def _active(self) -> WorldEntry | None:
        """The world to be linked with; the youngest, should two be called active."""
        assert self.table is not None
        active = [world for world in self.table.worlds if world.state == "active" and world.gateway]
        return max(active, key=lambda world: world.epoch, default=None)

    def _prepare_change(self, active: WorldEntry) -> None:
        """The world that serves goes on until the younger one has welcomed us."""
        if self._next_link is not None and self._next_link.entry.gateway == active.gateway:
            return
        self._drop_next_link()
        with contextlib.suppress(EndpointError):
            self._next_link = Link(active, self._connect)

    def _drop_next_link(self) -> None:
        link, self._next_link = self._next_link, None
        if link is not None:
            link.close()

    def _open(self, entry: WorldEntry) -> None:
        try:
            self._link = Link(entry, self._connect)
        except EndpointError as error:
            self._log.error("gateway endpoint", epoch=entry.epoch, detail=str(error))
            self._retry_later(entry.epoch)

    def _connect(self, link: Link) -> Connection:
        assert link.entry.gateway is not None
        return Connection(
            self._context,
            link.entry.gateway,
            on_welcome=lambda welcome: self._welcomed(link, welcome),
            on_message=lambda message: self._receive(link, message),
            on_lost=lambda reason: self._lost(link, reason),
            on_drained=self._requests.hand_over,
            name="front",
            silence_s=SILENCE_S,
        )

    def _welcomed(self, link: Link, welcome: Welcome) -> None:
        if link is self._next_link and welcome.epoch == link.entry.epoch:
            self._change(link)
        if link is not self._link:
            return
        if welcome.epoch != link.entry.epoch:
            # Another process has taken the port of a world that is gone.
            self._lost(link, f"it is of epoch {welcome.epoch}")
            return
        link.is_up = True
        self._retry_s = FIRST_RETRY_S
        self._log.info("world serves", epoch=welcome.epoch, tp=welcome.tp, pp=welcome.pp)
        self._requests.world_up(link, welcome)
        self._on_serving_changed()

    def _change(self, link: Link) -> None:
        """The younger world takes over."""
        old, self._link, self._next_link = self._link, link, None
        self._cancel_retry()
        if old is not None:
            self._log.info("world changed", epoch=link.entry.epoch, before=old.entry.epoch)
            self._requests.world_down()
            old.close()

    def _receive(self, link: Link, message: ServerMessage) -> None:
        if link is self._link and message.epoch == link.entry.epoch:
            self._requests.take(message)

    def _lost(self, link: Link, reason: str) -> None:
        if link is self._next_link:
            self._drop_next_link()  # the next table brings the next attempt
        if link is self._link:
            self._drop_link(reason)
            self._retry_later(link.entry.epoch)

    def _drop_link(self, reason: str) -> None:
        link, self._link = self._link, None
        if link is None:
            return
        was_up = link.is_up
        link.close()
        if was_up:
            self._served_until = time.monotonic()
            self._log.warning("world lost", epoch=link.entry.epoch, reason=reason)
            self._requests.world_down()
            self._on_serving_changed()

    def _retry_later(self, epoch: int) -> None:
        """The world may be dead without the supervisor knowing yet, or only the connection is."""
        self._retry_epoch = epoch
        self._retry = asyncio.get_running_loop().call_later(self._retry_s, self._try_again)
        self._retry_s = min(self._retry_s * 2, LAST_RETRY_S)

    def _cancel_retry(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def _try_again(self) -> None:
        self._retry = None
        active = self._active()
        if self._link is None and active is not None:
            self._open(active)


def _lists(table: WorldTable, entry: WorldEntry) -> bool:
    """Whether the table still calls this world active."""
    return any(
        (world.epoch, world.gateway, world.state) == (entry.epoch, entry.gateway, "active")
        for world in table.worlds
    )
