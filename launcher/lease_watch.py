"""How the rank of a guard on another host ends with its lease, even while the guard itself is stopped. Called by
ranks as they start; standard library only, and nothing of it is in the way of a step."""

from __future__ import annotations

import os
import signal
import threading
import time

from launcher.watch import ProgressPage

LATER_S = 0.1
"""The guard, which ends the rank in time, comes first. Less than what the supervisor adds to a lease."""

LOOK_S = 0.25
"""Seconds between two looks, since a lease may become shorter."""


def die_with_lease(page: ProgressPage) -> None:
    """From now on this process is killed when the lease on its page is over. No effect where there is none."""
    if page.lease_ends_at is not None:
        threading.Thread(target=_watch, args=(page,), name="lease", daemon=True).start()


def _watch(page: ProgressPage) -> None:
    while True:
        ends_at = page.lease_ends_at
        assert ends_at is not None
        left_s = ends_at + LATER_S - time.monotonic()
        if left_s <= 0:
            # Without a word: a log on a dead file system would keep it alive. The supervisor has a record.
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(min(left_s, LOOK_S))
