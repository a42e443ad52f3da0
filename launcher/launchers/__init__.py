"""How a world is started in one place or another: what `launcher.worlds` asks of each way. A launcher says which
command, environment and host file start the world, and how that command wants to be ended; it starts nothing."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from launcher.host_list import Host


class Launcher(Protocol):
    """One way to start worlds. Frozen: it is part of the plan of every world."""

    @property
    def program(self) -> str:
        """Name of the command, for messages."""

    @property
    def end_signal(self) -> signal.Signals:
        """What the command is sent first, when the ranks of a world were told to end."""

    @property
    def end_grace_s(self) -> float:
        """How long it may take from then on before it is killed."""

    @property
    def has_ranks_in_session(self) -> bool:
        """Whether guards and ranks of this host are in the session of the command, or under a daemon of others."""

    def host_file(self, hosts: Sequence[Host]) -> str:
        """Content of the file that names these hosts and their slots, as the command reads it."""

    def environment(
        self,
        ranks: int,
        cores: int,
        shm_dir: Path,
        session_dir: Path,
        base: Mapping[str, str],
        several_hosts: bool,
    ) -> dict[str, str]:
        """What the command and all it starts find in their environment, on top of `base`. `ranks`: most that one
        host has; `cores`: of this host."""

    def probe(self, environment: Mapping[str, str], host: Host) -> list[str]:
        """A command that ends with 0 where ranks can be started on that host."""

    def argv(
        self,
        hosts: Sequence[Host],
        ranks: int,
        command: Sequence[str],
        host_file: Path | None,
        names: Mapping[str, str],
    ) -> list[str]:
        """The command line that starts `command` once for each rank, on the hosts of `host_file` in its order, or
        here without one. `names`: the variables that ranks are to have."""
