"""How a rank ends: at once, with its reason in its log and an exit code that says whether another start can help.
Called by `engine.rank` for whatever ends it; must neither wait for another rank nor import anything."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from typing import NoReturn

EX_CONFIG = 78
"""sysexits.h: the configuration is wrong, trying again is useless."""

_CONFIGURATION = (
    ("engine.collectives.mpi", "WorldShapeError"),
    ("engine.engine", "ConfigurationError"),
    ("engine.models.errors", "ModelError"),
    ("engine.models.errors", "ShardingError"),
    ("gateway.curve", "CurveError"),
    ("gateway.errors", "EndpointError"),
)


def die(error: BaseException) -> NoReturn:
    """Ends this rank at once and without MPI_Finalize, which would wait for ranks that never come."""
    code = 1
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
    try:
        if isinstance(error, SystemExit):
            pass
        elif _is_configuration(error):
            code = EX_CONFIG
            say(f"phalanx: error: {error}")
        else:
            say("".join(traceback.format_exception(error)).rstrip())
        sys.stdout.flush()
    finally:
        os._exit(code)


def say(text: str) -> None:
    """One line or more to the rank's log, which may be on a disk that is full: no rank ends for that."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _is_configuration(error: BaseException) -> bool:
    """Whether somebody has to change something before another start can work. Imports nothing: a failed import may
    be what ends this rank."""
    loaded = ((sys.modules.get(module), name) for module, name in _CONFIGURATION)
    kinds = [getattr(module, name) for module, name in loaded if hasattr(module, name)]
    return isinstance(error, tuple(kinds))
