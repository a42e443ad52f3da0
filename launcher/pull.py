"""`phalanx pull`: brings a model to this machine, so that a later `serve` starts at once."""

from __future__ import annotations

from launcher.display import choose_display
from launcher.preparation import Stopped, prepare
from launcher.settings import default_cache_dir
from launcher.stop_signals import StopSignals


def pull(model: str, backend: str = "auto") -> int:
    """Downloads and imports it, and prints its folder. 0, or 130 if a signal ended it. Raises
    LauncherError."""
    with StopSignals() as stop, choose_display() as display:
        try:
            prepared = prepare(
                model,
                tp=1,
                pp=1,
                dtype="auto",
                cache_dir=default_cache_dir(),
                on_progress=lambda event: display.update(event.task, event.done, event.total, event.unit),
                stop_requested=stop.requested,
                backend=backend,
            )
            if prepared.license is not None:
                display.say(f"{prepared.name}: {prepared.license}")
        except Stopped:
            return 130
    print(prepared.path)
    return 0
