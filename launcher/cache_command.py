"""`phalanx cache list|prune`: what the shard cache holds, and less of it. Called by `cli`; the cache itself is read
and pruned by `engine.models.cache_contents`, a process."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.children import child_environment, python_module
from launcher.errors import LauncherError
from launcher.setting_values import parse_size
from launcher.settings import default_cache_dir

_FOLDER = re.compile(r"[0-9a-f]+-(tp\d+-pp\d+(?:-ep)?)-(.+)-(v\d+-.+)")
"""`<content>-<shape>-<type>[-<quantization>]-<layout version>-<instruction set>`"""

_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/[^/]+/?$")
"""How the hub's cache names the folder of a model."""

_IMPORT = re.compile(r"-[0-9a-f]{12}-v\d+$")
"""What the importer adds to the name of a GGUF file."""

_TITLES = ("model", "shape", "weights", "size", "last used", "in use", "folder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions and their flags; none means list."""
    parser.set_defaults(action="list", json=False)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", help="what to do (default: list)")
    listing = actions.add_parser("list", help="show what it holds")
    prune = actions.add_parser(
        "prune",
        help="remove what was used longest ago",
        description="Removes cut weights that no world uses, those that were used longest ago first, until its bound "
        "holds. They come back when they are needed.",
    )
    keep = prune.add_mutually_exclusive_group()
    keep.add_argument(
        "--keep",
        type=_size,
        metavar="BYTES",
        help="how much may stay, like 20GiB (default: the cache's bound)",
    )
    keep.add_argument("--all", action="store_true", help="keep only what is in use")
    prune.add_argument("--dry-run", action="store_true", help="say what would go, and remove nothing")
    for action in (listing, prune):
        action.add_argument("--json", action="store_true", help="print it for programs")


def cache(options: argparse.Namespace) -> int:
    """Runs one action. Raises LauncherError."""
    arguments: list[str] = []
    if options.action == "prune":
        arguments = ["--prune"] + (["--dry-run"] if options.dry_run else [])
        if options.all or options.keep is not None:
            arguments += ["--keep", str(0 if options.all else options.keep)]
    found = _ask(default_cache_dir().expanduser().absolute() / "shards", arguments)
    if options.json:
        print(json.dumps(found, indent=2))
    elif options.action == "prune":
        print("\n".join(_pruned(found, options.dry_run)))
    else:
        print("\n".join(_listed(found)))
    return 0


def _ask(root: Path, arguments: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run(
        [*python_module("engine.models.cache_contents"), str(root), *arguments],
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.strip().splitlines()[-1:] or [f"it exited with code {done.returncode}"]
        raise LauncherError(f"the shard cache {root} cannot be read: {lines[0]}") from None
    if "error" in answer:
        raise LauncherError(answer["error"])
    return answer


def _listed(found: dict[str, Any]) -> list[str]:
    """Most recently used first; then the total and the bound."""
    lines = _table(reversed(found["entries"])) if found["entries"] else []
    return [*lines, *_summary(found)]


def _summary(found: dict[str, Any]) -> list[str]:
    if not found["entries"]:
        return [f"{found['root']}: empty"]
    in_use = sum(entry["num_bytes"] for entry in found["entries"] if entry["in_use"])
    lines = [
        f"{found['root']}: {_bytes(found['held_bytes'])}, of which {_bytes(in_use)} in use; "
        f"bound {_bytes(found['bound_bytes'])}; the disk has {_bytes(found['free_bytes'])} free"
    ]
    if stale := sum(entry["stale_bytes"] for entry in found["entries"]):
        lines.append(f"{_bytes(stale)} are files of earlier cuts, which go first")
    if found["free_bytes"] < found["keep_free_bytes"]:
        lines.append(
            f"the disk has less than {_bytes(found['keep_free_bytes'])} free, a tenth of it: the next world that is "
            "cut takes the place of those that nobody uses"
        )
    return lines


def _pruned(found: dict[str, Any], dry_run: bool) -> list[str]:
    removed = found["removed"]
    count = len(removed["entries"]) + len(removed["files"])
    if not count:
        return ["nothing to remove", *_summary(found)]
    lines = _table(removed["entries"]) if removed["entries"] else []
    lines += [f"{file['path']}  {_bytes(file['num_bytes'])}" for file in removed["files"]]
    verb = "would remove" if dry_run else "removed"
    return [*lines, f"{verb} {_bytes(removed['removed_bytes'])}", *_summary(found)]


def _table(entries: Any) -> list[str]:
    cells: list[Sequence[str]] = [_TITLES, *(_cells(entry) for entry in entries)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_TITLES))]
    return [
        "  ".join(
            text.rjust(width) if _TITLES[column] == "size" else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _cells(entry: dict[str, Any]) -> tuple[str, ...]:
    parts = _FOLDER.fullmatch(entry["folder"])
    shape, weights = (parts[1], parts[2]) if parts else ("-", "-")
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry["last_used"]))
    in_use = "yes" if entry["in_use"] else "no"
    return (
        model_name(entry["model"]),
        shape,
        weights,
        _bytes(entry["num_bytes"]),
        used,
        in_use,
        entry["folder"],
    )


def model_name(path: str) -> str:
    """As the user called it, where the path says so."""
    if not path:
        return "-"
    if snapshot := _SNAPSHOT.search(path):
        return f"{snapshot[1]}/{snapshot[2]}"
    folder = Path(path)
    own = folder.parent == default_cache_dir().expanduser().absolute() / "models"
    return _IMPORT.sub("", folder.name) if own else path


def _bytes(count: int) -> str:
    if count >= 2**30:
        return f"{count / 2**30:.1f} GiB"
    if count >= 2**20:
        return f"{count / 2**20:.0f} MiB"
    return f"{count / 2**10:.0f} KiB" if count >= 2**10 else f"{count} B"


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
