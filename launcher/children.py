"""How the launcher starts Python processes of its own project: the command and the environment. Used by
everything here that starts one; must find this very code, wherever the user stands."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path


def python_module(module: str) -> list[str]:
    """The command that runs a module with this interpreter."""
    # -P: a folder named `engine` where the user happens to stand must not be taken for ours.
    return [sys.executable, "-P", "-m", module]


def child_environment(base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of every process of the deployment: ours, and the way to this code."""
    environment = dict(base)
    root = Path(__file__).resolve().parent.parent
    if root.name not in ("site-packages", "dist-packages"):  # a checkout: those are found by themselves
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), environment.get("PYTHONPATH")]))
    return environment
