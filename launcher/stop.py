"""`phalanx stop`: ends a deployment by its run folder, whether its supervisor lives or was killed. It signals
nobody whose start time it has not checked."""

from __future__ import annotations

import signal
from pathlib import Path

from launcher.errors import LauncherError
from launcher.processes import AdoptedProcess
from launcher.run_dir import RunDir, RunDirInUse
from launcher.settings import default_run_dir

_LOOK_AGAIN_S = 3600.0


def stop(port: int, run_dir: Path | None) -> int:
    """Waits until everything has ended, as long as the supervisor takes for that. Returns 0. Raises
    LauncherError."""
    path = run_dir if run_dir is not None else default_run_dir(port)
    if not (path / "lock").exists():
        raise LauncherError(f"{path} is no run folder; give the one of the deployment with --run-dir")
    try:
        folder = RunDir(path)
    except RunDirInUse as error:
        _stop_supervisor(error)
        print("stopped")
        return 0
    try:
        ended = folder.remove_leftovers()
    finally:
        folder.close()
    print(
        f"ended {len(ended)} processes that a killed supervisor had left" if ended else "nothing runs there"
    )
    return 0


def _stop_supervisor(error: RunDirInUse) -> None:
    if error.supervisor is None:
        raise error
    try:
        supervisor = AdoptedProcess(error.supervisor)
    except OSError:
        return  # it has just ended
    supervisor.send_signal(signal.SIGTERM)
    supervisor.wait(_LOOK_AGAIN_S)
