"""What the user of `phalanx serve` sees while it starts and once it serves: progress, the table of ranks, the address
and a command to try. Called by `serve`; decides nothing."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
from pathlib import Path

from gateway.control_messages import FrontState
from launcher.access_settings import KEY_VARIABLE
from launcher.display import Display
from launcher.preparation import PreparationProgress
from launcher.rank_table import table_of
from launcher.settings import Settings
from launcher.watch import Phase
from launcher.worlds import World


class DisplayHandler(logging.Handler):
    """Log lines go where the bars are drawn, so that neither disturbs the other."""

    def __init__(self, display: Display) -> None:
        super().__init__()
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        self._display.say(self.format(record))


def show_preparation(display: Display, progress: PreparationProgress) -> None:
    display.update(progress.task, progress.done, progress.total, progress.unit)


class StartProgress:
    """What a starting world does, told once for each change."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._told: tuple[int, Phase] | None = None
        self._table_told = False

    def show(self, world: World) -> None:
        if not self._table_told and (lines := table_of(world)):
            self._table_told = True
            for line in lines:
                self._display.say(line)
        phases = [watch.phase for watch in world.ranks.values()]
        slowest = min(phases) if len(phases) == world.size else Phase.STARTING
        if (world.epoch, slowest) != self._told:
            self._told = (world.epoch, slowest)
            if slowest < Phase.LOADING or slowest is Phase.IDLE:
                doing = "waiting for the front" if slowest is Phase.IDLE else slowest.name.lower()
                ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
                self._display.say(f"world {world.epoch}: {ranks} {doing}")
        done, total = world.load_progress
        if total:
            self._display.update("load", done, total, "B")


def client_url(settings: Settings, port: int, node: str = "127.0.0.1") -> str:
    """Where clients of this machine reach the front; those of others, if it listens for them, with the address
    of the `node`."""
    host, scheme = settings.host, "http" if settings.ssl_certfile is None else "https"
    if host in ("0.0.0.0", "::", ""):
        host = node
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def say_ready_line(
    display: Display, settings: Settings, port: int, world: World, state: FrontState, model_dir: Path
) -> None:
    display.finish()
    url = client_url(settings, port)
    name = world.plan.served_model_name
    shape = f"(tp {world.plan.tp}, pp {world.plan.pp})"
    with contextlib.suppress(OSError):  # serving does not depend on somebody reading this
        grpc = "" if state.grpc is None else f"  grpc {state.grpc.replace('0.0.0.0', '127.0.0.1')}"
        print(f"ready  {url}  zmq {state.zmq}  model {name}  world {world.epoch} {shape}{grpc}")
        print(
            curl_line(url, name, model_dir, settings.asks_for_keys),
            flush=True,
        )


def curl_line(url: str, model: str, model_dir: Path, needs_key: bool = False) -> str:
    """A command that works when pasted: a chat if the model has a chat template, else a completion."""
    body: dict[str, object] = {"model": model}
    if _has_chat_template(model_dir):
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": "Name three colours."}]
    else:
        path = "/v1/completions"
        body["prompt"] = "The sky is"
    body["max_tokens"] = 48
    header = shlex.quote("Content-Type: application/json")
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if needs_key else ""
    return f"curl {shlex.quote(url + path)} -H {header}{key} -d {shlex.quote(json.dumps(body))}"


def _has_chat_template(model_dir: Path) -> bool:
    if (model_dir / "chat_template.jinja").exists() or (model_dir / "chat_template.json").exists():
        return True
    try:
        content = json.loads((model_dir / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and bool(content.get("chat_template"))
