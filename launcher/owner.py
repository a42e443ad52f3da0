"""The process that has started `phalanx serve` for itself alone, as `phalanx.Server` does: the deployment ends with
it, however it ends. Used by `serve`; without such a process nothing happens."""

from __future__ import annotations

import os
import select
from collections.abc import MutableMapping

OWNER_VARIABLE = "PHALANX_OWNER_PID"


class Owner:
    """Seen by its process, not by the thread that made this one, which may end long before."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        """Takes the variable out of the environment: it is for this process alone."""
        pid = environment.pop(OWNER_VARIABLE, "")
        self._poll = select.poll()
        self._has_ended = False
        if pid.isdigit():
            try:
                self._poll.register(os.pidfd_open(int(pid)), select.POLLIN)
            except OSError:
                self._has_ended = True
            # An owner that has ended is no parent any more, and its pid may mean another process.
            self._has_ended |= os.getppid() != int(pid)

    def has_ended(self) -> bool:
        """Never waits."""
        self._has_ended = self._has_ended or bool(self._poll.poll(0))
        return self._has_ended
