"""When the next spare is started, and the one that is there. Used by the supervisor alone; it starts and ends no
process itself, and must never hold up the world that serves."""

from __future__ import annotations

from launcher.watch import SpareKind
from launcher.worlds import World

SETTLE_S = 0.5
"""Wait before a spare is started, from the moment at which the first world serves."""
REPLAY_S = 3.0
"""The same for a world that has taken over after a fault: it may have requests to compute again."""
RESUMED_S = 2.0
"""The least wait from the first token of such a request: its companions are still being computed again."""
BACK_OFF_S = 1.0
MAX_BACK_OFF_S = 60.0
"""Wait after a spare died, doubled each time."""
STABLE_AFTER_S = 30.0
"""A spare that was parked for so long was a good one: the next back-off is short again."""


class Spares:
    """Holds the spare, if there is one, and knows when the next one is due."""

    def __init__(self, kind: SpareKind) -> None:
        self.kind = kind
        self.world: World | None = None
        """The spare, from its start to its promotion or its first fault."""
        self._losses = 0
        self._not_before = 0.0
        self._calm_at: float | None = None
        """When the world that serves has settled; None while none serves."""

    def on_served(self, now: float, recovered: bool) -> None:
        """A world serves; `recovered`: it took over after a fault."""
        self._calm_at = now + (REPLAY_S if recovered else SETTLE_S)

    def on_resumed(self, now: float) -> None:
        """The first of the requests that it took over has got a token."""
        if self._calm_at is not None:
            self._calm_at = max(self._calm_at, now + RESUMED_S)

    def on_unserved(self) -> None:
        """The world that served has died: no spare is started before the next one serves."""
        self._calm_at = None

    def is_due(self, now: float) -> bool:
        """Whether the next spare is to be started now."""
        return (
            self.kind is not SpareKind.NONE
            and self.world is None
            and self._calm_at is not None
            and now >= max(self._calm_at, self._not_before)
        )

    def take(self) -> World | None:
        """The spare, parked or on its way there, for promotion: it started earlier than any other world could."""
        world, self.world = self.world, None
        return world

    def lose(self, now: float) -> float:
        """The spare has died, or could not be started. Returns the seconds until the next one is started at the
        earliest."""
        parked = self.world.times.parked if self.world is not None else None
        self.world = None
        if parked is not None and now - parked > STABLE_AFTER_S:
            self._losses = 0
        back_off_s = min(BACK_OFF_S * 2**self._losses, MAX_BACK_OFF_S)
        self._losses += 1
        self._not_before = now + back_off_s
        return back_off_s
