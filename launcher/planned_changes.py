"""From the settings of a deployment to the world that they ask for, at its start and at each planned change. Used by
`serve`; knows what may change while it serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.children import python_module
from launcher.errors import LauncherError, SettingsError
from launcher.preparation import PreparedModel
from launcher.reload import Change
from launcher.settings import RELOADABLE, Settings, default_cache_dir
from launcher.watch import SpareKind
from launcher.world_records import WorldPlan

HOT_MEMORY_SHARE = 0.5
"""Of what a world would take for its KV cache if it were alone on its host."""


def rank_command(settings: Settings, prepared: PreparedModel, name: str) -> list[str]:
    """What a guard starts as its rank, without what differs between worlds (see WorldPlan)."""
    command = [*python_module("engine.rank"), "--model", str(prepared.path), "--served-model-name", name]
    command += [
        "--dtype",
        prepared.dtype,
        "--quantization",
        settings.quantization,
        "--backend",
        settings.backend,
    ]
    command += ["--max-num-seqs", str(settings.max_num_seqs)]
    command += ["--max-num-batched-tokens", str(settings.max_num_batched_tokens)]
    command += ["--step-factor", f"{settings.step_factor:g}"]
    command += ["--shard-cache", str(default_cache_dir() / "shards"), "--gateway", "tcp://127.0.0.1:*"]
    if settings.expert_parallel:
        command.append("--expert-parallel")
    if settings.deterministic:
        command.append("--deterministic")
    if settings.max_model_len:
        command += ["--max-model-len", str(settings.max_model_len)]
    if settings.kv_cache_memory:
        command += ["--kv-cache-memory", str(settings.kv_cache_memory)]
    if settings.spare == SpareKind.HOT.value:
        command += ["--memory-share", str(HOT_MEMORY_SHARE)]
    return command


class PlannedChanges:
    """Makes the plans of worlds that are to take over from the one that serves."""

    def __init__(
        self,
        settings: Settings,
        prepared: PreparedModel,
        plan: WorldPlan,
        on_made: Callable[[Settings, PreparedModel], None],
    ) -> None:
        """`on_made` is called when a world with other settings has taken over."""
        self._on_made = on_made
        self._settings = settings
        self._prepared = prepared
        self._plan = plan

    def describe(self) -> dict[str, Any]:
        """What `phalanx reload` begins with."""
        shown = {name: getattr(self._settings, name) for name in RELOADABLE}
        if Path(self._settings.model).exists():  # whoever asks may stand elsewhere
            shown["model"] = str(Path(self._settings.model).absolute())
        return {**shown, "model_dir": str(self._prepared.path)}

    def make(self, settings: dict[str, Any], prepared: dict[str, Any]) -> Change:
        """Raises LauncherError for what cannot be, KeyError or TypeError for what cannot be read."""
        if not set(settings) <= set(RELOADABLE):
            raise SettingsError(f"only these can be changed: {', '.join(RELOADABLE)}")
        new = dataclasses.replace(self._settings, **settings)
        model = PreparedModel(**{**prepared, "path": Path(prepared["path"])})
        before, after = (longest_request(*of) for of in ((self._settings, self._prepared), (new, model)))
        if after < before:
            raise LauncherError(
                f"--max-model-len would become {after}, and requests of up to {before} tokens have been accepted; "
                "stop the server and start it anew for that"
            )
        plan = dataclasses.replace(
            self._plan,
            tp=new.tp,
            pp=new.pp,
            rank_command=rank_command(new, model, self._plan.served_model_name),
            version=str(int(self._plan.version) + 1),
            max_model_len=after,
        )
        return Change(plan, SpareKind(new.spare), after, new, model)

    def made(self, change: Change) -> None:
        self._settings, self._prepared, self._plan = change.settings, change.prepared, change.plan
        self._on_made(change.settings, change.prepared)


def longest_request(settings: Settings, prepared: PreparedModel) -> int:
    """Tokens of prompt and output together."""
    return settings.max_model_len or prepared.max_model_len
