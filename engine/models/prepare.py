"""`python -m engine.models.prepare MODEL`: makes a model ready to be served, before a world starts.

Started as a process by the supervisor and the command line. Speaks JSON lines on standard output: progress
events, then one `ready` or one `error` event (exit code 2). Imports no torch, and nothing slow when there is
nothing to do; with `--backend deepspeed` it imports transformers, and torch with it.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from engine.models import echo_model
from engine.models.catalog import ResolvedModel, default_cache_folder, is_here, resolve_model
from engine.models.config import ModelConfig
from engine.models.errors import ModelError
from engine.models.sharding import shard_world
from engine.models.source_files import SourceFiles

if TYPE_CHECKING:
    from engine.backends.model_facts import HuggingFaceModel

EXIT_ERROR = 2

_MIN_INTERVAL_S = 0.05


def prepare(
    model: str,
    tp: int,
    pp: int,
    dtype: str,
    cache: Path,
    report: Reporter,
    backend: str = "auto",
    expert_parallel: bool = False,
) -> dict[str, Any]:
    """Finds, fetches, imports and checks a model; returns the `ready` event. Raises ModelError."""
    resolved = resolve_model(model, cache, report.progress)
    folder = resolved.folder
    if echo_model.is_echo(folder):
        return _prepare_echo(resolved, tp, pp)
    config = _check(folder, tp, pp, backend, expert_parallel)
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"{folder} has no tokenizer.json; save it there with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return {
        "event": "ready",
        "path": str(folder),
        "name": resolved.name,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "max_model_len": config.max_model_len,
        "vocab_size": config.vocab_size,
        "dtype": config.resolve_dtype(dtype),
        **({} if resolved.license is None else {"license": resolved.license}),
    }


def _prepare_echo(resolved: ResolvedModel, tp: int, pp: int) -> dict[str, Any]:
    if (tp, pp) != (1, 1):
        raise ModelError(
            f"--tp {tp} --pp {pp}: the echo model has nothing to share; its world is one rank, leave both out"
        )
    return {
        "event": "ready",
        "path": str(resolved.folder),
        "name": resolved.name,
        "num_layers": 0,
        "num_heads": 0,
        "max_model_len": echo_model.MAX_MODEL_LEN,
        "vocab_size": echo_model.VOCAB_SIZE,
        "dtype": "auto",
    }


def _check(
    folder: Path, tp: int, pp: int, backend: str, expert_parallel: bool
) -> ModelConfig | HuggingFaceModel:
    """The facts about a model that the backend can serve on such a world. Raises ModelError."""
    if backend == "deepspeed":
        if expert_parallel:
            raise ModelError(
                "--expert-parallel is not possible with --backend deepspeed; leave one of them out"
            )
        from engine.backends.model_facts import HuggingFaceModel

        facts = HuggingFaceModel.from_folder(folder)
        facts.check_shape(tp, pp)
        SourceFiles(folder).check_headers()
        return facts
    if backend not in ("auto", "phalanx"):
        raise ModelError(f"--backend {backend} is not known; allowed are auto, phalanx and deepspeed")
    config = ModelConfig.from_folder(folder)
    shard_world(config, tp, pp, expert_parallel)
    SourceFiles(folder).check(config)
    return config


class Reporter:
    """Writes events as JSON lines; progress at most twenty times a second, but the last of a task always."""

    def __init__(self) -> None:
        self._last = 0.0

    def progress(self, task: str, done: int, total: int | None, unit: str) -> None:
        now = time.monotonic()
        if done != total and now - self._last < _MIN_INTERVAL_S:
            return
        self._last = now
        self.event({"event": "progress", "task": task, "done": done, "total": total, "unit": unit})

    def event(self, event: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()


class _Arguments(argparse.ArgumentParser):
    """Reports wrong arguments as an error event, like everything else that can go wrong."""

    def error(self, message: str) -> NoReturn:
        raise ModelError(message)


def main(arguments: list[str] | None = None) -> int:
    """The process. Its exit code is 0 after `ready`, 2 after `error`."""
    # Whoever ends this process wants half-made files and a running pip to go with it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    parser = _Arguments(
        prog="python -m engine.models.prepare", description="Makes a model ready to be served."
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--expert-parallel", action="store_true")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--backend", default="auto")
    parser.add_argument(
        "--no-fetch", action="store_true", help="neither fetch nor import: say what is missing"
    )
    parser.add_argument("--cache", type=Path, default=None, help="model cache; default $PHALANX_CACHE")
    report = Reporter()
    try:
        options = parser.parse_args(arguments)
        cache = (options.cache or default_cache_folder()).expanduser().absolute()
        if options.no_fetch and not is_here(options.model, cache):
            message = f"{options.model} is not here yet; `phalanx pull {options.model}` brings it"
            report.event({"event": "absent", "message": message})
            return EXIT_ERROR
        ready = prepare(
            options.model,
            options.tp,
            options.pp,
            options.dtype,
            cache,
            report,
            options.backend,
            options.expert_parallel,
        )
        report.event(ready)
    except ModelError as error:
        report.event({"event": "error", "message": str(error)})
        return EXIT_ERROR
    except OSError as error:
        report.event(
            {"event": "error", "message": f"{error.filename or 'the model cache'}: {error.strerror}"}
        )
        return EXIT_ERROR
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
