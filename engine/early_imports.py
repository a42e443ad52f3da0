"""The imports of a rank that is parked behind them: they take seconds of cores that the world that serves wants too.
Called by `engine.rank` for spares, before anything else runs in the process."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Callable, Sequence

SPARE_NICENESS = 10


def import_at_low_priority(modules: Sequence[str], is_hurried: Callable[[], bool]) -> None:
    """Imports what takes long in a thread that gives way to the world that serves, until `is_hurried`. A thread,
    since nobody but root may raise a priority again, and the rank itself must not stay low."""

    def work() -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), SPARE_NICENESS)
        # What fails here fails again in the rank's own thread, and is reported there.
        with contextlib.suppress(Exception):
            for name in modules:
                importlib.import_module(name)

    thread = threading.Thread(target=work)
    thread.start()
    hurried = False
    while thread.is_alive():
        thread.join(0.05)
        if not hurried and is_hurried() and thread.native_id is not None:
            hurried = True
            with contextlib.suppress(OSError):  # without the right to it, it stays low: no world competes now
                os.setpriority(os.PRIO_PROCESS, thread.native_id, 0)
