"""A planned change of the world, the supervisor's side: hears `phalanx reload`, keeps the world that is to take over
until the front serves from it, and says how it went. Used by the supervisor alone; it must never block, and whatever
fails here leaves the world that serves as it is."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import zmq

from launcher.errors import LauncherError
from launcher.watch import SpareKind
from launcher.world_records import WorldFault, WorldPlan
from launcher.worlds import World

MAX_COMMAND_BYTES = 64 * 1024
WORD_INTERVAL_S = 1.0
"""How often whoever waits for a change hears that it goes on."""
BLOCK_TOKENS = 16
CHECK_INTERVAL_MS = 500


@dataclass(frozen=True)
class Change:
    """What the next world is to be."""

    plan: WorldPlan
    spare: SpareKind
    max_model_len: int
    settings: Any
    prepared: Any
    """What it was made of; for its maker."""


class ChangeMaker(Protocol):
    """Knows what a world is made of: the settings of the deployment."""

    def describe(self) -> dict[str, Any]:
        """The settings of the world that serves."""

    def make(self, settings: dict[str, Any], prepared: dict[str, Any]) -> Change:
        """Raises LauncherError for what cannot be, ValueError, KeyError or TypeError for what cannot be read."""

    def made(self, change: Change) -> None:
        """It serves from now on."""


class Reloads:
    """The command socket, and the change that is under way, if there is one."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], path: Path, changes: ChangeMaker | None = None
    ) -> None:
        self.world: World | None = None
        """The one that is to take over, from its start until the front serves from it."""
        self.change: Change | None = None
        self._changes = changes
        self._asker: bytes | None = None
        self._began = 0.0
        self._next_word = 0.0
        self.socket = context.socket(zmq.ROUTER)
        self.socket.linger = 500
        self.socket.maxmsgsize = MAX_COMMAND_BYTES
        self.socket.router_mandatory = True
        path.unlink(missing_ok=True)
        self.socket.bind(f"ipc://{path}")
        os.chmod(path, 0o600)  # beside the folder's 0700
        self._path = path

    def close(self) -> None:
        self.socket.close()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def hear(self, now: float, refusal: str | None) -> Change | None:
        """Answers what came in. Returns a change that is to begin now, unless there is a `refusal`: why none can."""
        while True:
            try:
                identity, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                command = json.loads(b"".join(frames))
                if command["command"] == "settings":
                    settings = self._changes.describe() if self._changes is not None else {}
                    self._send(identity, event="settings", settings=settings)
                elif command["command"] == "reload":
                    if self.change is not None:
                        refusal = "another change of the world is under way; wait for its end"
                    self._begin(identity, command["settings"], command["prepared"], refusal, now)
                    return self.change
                else:
                    self._send(
                        identity, event="failed", reason="an unknown command; is this the same version?"
                    )
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                self._send(identity, event="failed", reason=f"a command that cannot be read: {error!r}")
            except LauncherError as error:
                self._send(identity, event="failed", reason=str(error))
        if self.world is not None and now >= self._next_word:
            self._next_word = now + WORD_INTERVAL_S
            phases = sorted({watch.phase.name.lower() for watch in self.world.ranks.values()})
            done, total = self.world.load_progress
            text = f"world {self.world.epoch} is {', '.join(phases) or 'starting'}"
            self._send(self._asker, event="going on", text=text, done=done, total=total)
        return None

    def begin_own(self, plan: WorldPlan, spare: SpareKind, now: float) -> Change:
        """A change that nobody asked for: the same settings, on more hosts."""
        self.change = Change(plan, spare, plan.max_model_len, None, None)
        self._asker = None
        self._began = self._next_word = now
        return self.change

    def problem(self, current: World | None) -> str | None:
        """Why the new world must not take over: the front goes to the youngest one only, and what was accepted must
        fit into its KV cache, once that is known."""
        if self.world is None or self.change is None:
            return None
        if current is not None and current.epoch > self.world.epoch and current.times.served is not None:
            return (
                f"the world that served has died meanwhile, and world {current.epoch}, which is younger than this "
                "one, has taken its place; ask again"
            )
        if not self.world.kv_blocks:
            return None
        tokens = self.world.kv_blocks * BLOCK_TOKENS
        before = current.kv_blocks * BLOCK_TOKENS if current is not None else 0
        if tokens >= min(before, self.change.max_model_len or before):
            return None
        return (
            f"its KV cache holds {tokens} tokens, the one before {before}: what was accepted might not fit; "
            "give more with --kv-cache-memory"
        )

    def done(self, now: float) -> Change:
        """The front serves from the new world."""
        assert self.change is not None and self.world is not None
        change, world = self.change, self.world
        if self._changes is not None and change.settings is not None:
            self._changes.made(change)
        self._send(
            self._asker,
            event="done",
            epoch=world.epoch,
            version=change.plan.version,
            seconds=now - self._began,
        )
        self._forget()
        return change

    def fail(self, fault: WorldFault) -> None:
        """The new world will not take over."""
        lines = fault.last_lines.splitlines()
        said = next((line for line in reversed(lines) if line.startswith("phalanx: error: ")), None)
        reason = (
            said.removeprefix("phalanx: error: ") if said else f"the new world did not start: {fault.detail}"
        )
        self._send(self._asker, event="failed", reason=reason, lines=[] if said else lines[-15:])
        self._forget()

    def _forget(self) -> None:
        self.world = self.change = self._asker = None

    def _begin(
        self,
        identity: bytes,
        settings: dict[str, Any],
        prepared: dict[str, Any],
        refusal: str | None,
        now: float,
    ) -> None:
        if refusal is not None or self._changes is None:
            self._send(identity, event="failed", reason=refusal or "this deployment cannot be changed")
            return
        self.change = self._changes.make(settings, prepared)
        self._asker = identity
        self._began = now
        self._next_word = now

    def _send(self, identity: bytes | None, **event: Any) -> None:
        if identity is not None:
            with contextlib.suppress(zmq.ZMQError):  # whoever asked did not wait for the answer
                self.socket.send_multipart([identity, json.dumps(event).encode()], zmq.NOBLOCK)


def ask(
    path: Path, command: dict[str, Any], silence_s: float, check: Callable[[], None] = lambda: None
) -> Iterator[dict[str, Any]]:
    """Client: sends a command to the socket of a supervisor and yields its events, for as long as none is further
    away than `silence_s` from the one before. `check` is called twice a second, and may raise. Raises LauncherError
    if nobody answers (any more)."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    try:
        socket.connect(f"ipc://{path}")
        socket.send(json.dumps(command).encode())
        while True:
            give_up_at = time.monotonic() + silence_s
            while not socket.poll(CHECK_INTERVAL_MS):
                check()
                if time.monotonic() >= give_up_at:
                    raise LauncherError(
                        "the supervisor does not answer; `phalanx status` shows what is served"
                    )
            yield json.loads(socket.recv())
    finally:
        socket.close()
        context.term()
