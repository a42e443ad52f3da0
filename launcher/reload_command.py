"""`phalanx reload`: gives a deployment that serves a new world, with other weights or flags, and drops no request.
Called by `cli`; brings the model here first, and refuses what cannot be moved."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from launcher.display import Display, choose_display
from launcher.errors import LauncherError
from launcher.preparation import PreparedModel, Stopped, prepare
from launcher.processes import ProcessId, is_alive
from launcher.reload import ask
from launcher.settings import RELOADABLE, Settings, default_cache_dir, default_run_dir
from launcher.stop_signals import StopSignals

ANSWER_S = 5.0
SILENCE_S = 30.0
_IGNORED_TOKENIZER_KEYS = ("version", "truncation", "padding")


def reload(arguments: argparse.Namespace) -> int:
    """0 when the new world serves. Raises LauncherError with the reason if the old one goes on."""
    run_dir = Path(arguments.run_dir or default_run_dir(arguments.port))
    return reload_to(run_dir, Settings.changes_from(arguments))


def reload_to(run_dir: Path, changes: dict[str, Any]) -> int:
    """The same with settings by name."""
    path = run_dir / "commands.sock"
    if not path.exists():
        raise LauncherError(
            f"nothing is served from {run_dir}; say which deployment with --port or --run-dir, "
            "or start one with `phalanx serve`"
        )
    supervisor = _Supervisor(run_dir)
    [answer] = [next(ask(path, {"command": "settings"}, ANSWER_S, supervisor.check))]
    old = answer["settings"]
    settings = changed(old, changes)
    with StopSignals() as stop, choose_display() as display:
        try:
            prepared = prepare(
                settings.model,
                settings.tp,
                settings.pp,
                settings.dtype,
                default_cache_dir(),
                lambda event: display.update(event.task, event.done, event.total, event.unit),
                stop.requested,
                settings.backend,
                settings.expert_parallel,
            )
        except Stopped:
            return 130
        check_same_tokenizer(Path(old["model_dir"]), prepared.path)
        if (old_template := _chat_template(Path(old["model_dir"]))) != _chat_template(prepared.path):
            what = "the old one stays in use" if old_template else "none stays in use"
            display.say(f"the chat template is another one; {what} until the server is started anew")
        return _wait(path, settings, prepared, display, supervisor)


class _Supervisor:
    """The one that is asked, by what it has written down of itself."""

    def __init__(self, run_dir: Path) -> None:
        self._process = None
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            self._process = ProcessId(**json.loads((run_dir / "processes.json").read_text())["supervisor"])

    def check(self) -> None:
        """Raises LauncherError if it has ended."""
        if self._process is not None and not is_alive(self._process):
            raise LauncherError(
                "the supervisor has ended meanwhile, and the new world with it. What served before goes on for a "
                "while: start `phalanx serve` with the same flags to take it over, then reload again"
            )


def changed(old: dict[str, Any], changes: dict[str, Any]) -> Settings:
    """The settings of the next world. Raises SettingsError."""
    known = {name: value for name, value in old.items() if name in RELOADABLE}
    return Settings(**{**known, **changes})


def check_same_tokenizer(old: Path, new: Path) -> None:
    """Raises LauncherError if texts become other tokens: what runs could not go on."""
    if old == new:
        return
    first, second = (_tokenizer(folder) for folder in (old, new))
    if first != second:
        raise LauncherError(
            f"{new} has another tokenizer than the model that is served ({old}): running requests could not go on "
            "with it; serve it as a deployment of its own, or stop this one and start it anew"
        )


def _tokenizer(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "tokenizer.json").read_text())
    except (OSError, ValueError) as error:
        raise LauncherError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise LauncherError(f"{folder / 'tokenizer.json'} is no tokenizer")
    return {key: value for key, value in content.items() if key not in _IGNORED_TOKENIZER_KEYS}


def _chat_template(folder: Path) -> object:
    try:
        return (folder / "chat_template.jinja").read_text()
    except OSError:
        pass
    try:
        content = json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        return None
    return content.get("chat_template") if isinstance(content, dict) else None


def _wait(
    path: Path, settings: Settings, prepared: PreparedModel, display: Display, supervisor: _Supervisor
) -> int:
    wanted = {name: getattr(settings, name) for name in RELOADABLE}
    if Path(settings.model).exists():
        wanted["model"] = str(Path(settings.model).absolute())
    model = {**dataclasses.asdict(prepared), "path": str(prepared.path)}
    told = ""
    command = {"command": "reload", "settings": wanted, "prepared": model}
    for event in ask(path, command, SILENCE_S, supervisor.check):
        if event["event"] == "failed":
            for line in event.get("lines", ()):
                display.say(f"    {line}")
            raise LauncherError(f"{event['reason']}; nothing was changed")
        if event["event"] == "done":
            display.finish()
            print(
                f"reloaded  world {event['epoch']}  version {event['version']}  after {event['seconds']:.1f} s"
            )
            return 0
        if event.get("total"):
            display.update("load", event["done"], event["total"], "B")
        if event.get("text", told) != told:
            told = event["text"]
            display.say(told)
    raise AssertionError("the events of a reload never end by themselves")
