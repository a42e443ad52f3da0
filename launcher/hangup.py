"""SIGHUP. Where `phalanx serve` was started from a terminal, its hang-up ends the deployment (`stop_signals.py`).
Without one, as a daemon, the signal means what it means to daemons: read the settings and the model again. Used by
`serve`; the work is done by a process of its own, `python -m launcher.hangup RUN_DIR SETTINGS`, as by `reload`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from launcher.children import child_environment, python_module
from launcher.errors import LauncherError
from launcher.logs import EventLog
from launcher.settings import RELOADABLE, Settings


def has_terminal() -> bool:
    """Whether this process can be hung up on."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


class HangupReload:
    """The reload that a SIGHUP has asked for, one at a time. Never blocks and never raises."""

    def __init__(self, run_dir: Path, read_settings: Callable[[], Settings], log: EventLog) -> None:
        self._run_dir = run_dir
        self._read_settings = read_settings
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._log_path = run_dir / "reload.log"
        self._asked = False
        """Whether a signal has come that is not answered yet."""

    def check(self, asked: bool) -> None:
        """To be called now and then. `asked`: a signal has come."""
        if self._process is not None and (code := self._process.poll()) is not None:
            self._process = None
            if code:
                self._log.error("SIGHUP: nothing was changed", log=str(self._log_path), exit_code=code)
        if asked and self._process is not None:
            self._log.info("SIGHUP: a reload is under way; settings and model are read once more after it")
        self._asked |= asked
        if not self._asked or self._process is not None:
            return
        self._asked = False
        try:
            settings = self._read_settings()
            wanted = json.dumps({name: getattr(settings, name) for name in RELOADABLE})
            command = python_module("launcher.hangup")
            with self._log_path.open("wb") as log:
                self._process = subprocess.Popen(
                    [*command, str(self._run_dir), wanted],
                    env=child_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except (LauncherError, OSError) as error:
            self._log.error("SIGHUP: nothing was changed", detail=str(error))
        else:
            self._log.info("SIGHUP: settings and model are read again", log=str(self._log_path))


def main(arguments: list[str]) -> int:
    from launcher.reload_command import reload_to

    run_dir, settings = arguments
    try:
        return reload_to(Path(run_dir), json.loads(settings))
    except LauncherError as error:
        print(f"phalanx: error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
