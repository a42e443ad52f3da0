"""`python -m engine.models.cache_contents ROOT`: says what the shard cache holds, or prunes it.

Started as a process by `phalanx cache`. Prints one JSON object; `error` in it is for a person (exit code 2). Imports
no torch.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from engine.models.cache_entries import Entry
from engine.models.errors import ModelError
from engine.models.shard_cache import ShardCache


def contents(root: Path) -> dict[str, Any]:
    """What lies there, least recently used first; a cache that was never made is an empty one. Raises ModelError."""
    if not root.is_dir():
        return {"root": str(root), "entries": [], "held_bytes": 0}
    cache = ShardCache(root)
    found = cache.entries()
    held = sum(entry.num_bytes for entry in found)
    return {
        "root": str(root),
        "entries": [_facts(entry) for entry in found],
        "held_bytes": held,
        "bound_bytes": cache.bound_bytes(held),
        "free_bytes": shutil.disk_usage(root).free,
        "keep_free_bytes": cache.keep_free_bytes,
    }


def prune(root: Path, keep_bytes: int | None, dry_run: bool) -> dict[str, Any]:
    """What `contents` says afterwards, and what was removed, or would be. Raises ModelError."""
    removed: dict[str, Any] = {"entries": [], "files": [], "removed_bytes": 0}
    if root.is_dir():
        clearing = ShardCache(root).prune(keep_bytes, dry_run)
        removed["entries"] = [_facts(entry) for entry in clearing.entries]
        removed["files"] = [
            {"path": str(file.path), "num_bytes": file.num_bytes, "last_used": file.last_used}
            for file in clearing.files
        ]
        removed["removed_bytes"] = clearing.num_bytes
    return contents(root) | {"removed": removed}


def _facts(entry: Entry) -> dict[str, Any]:
    return {
        "folder": entry.folder.name,
        "model": entry.model,
        "num_bytes": entry.num_bytes,
        "last_used": entry.last_used,
        "in_use": entry.in_use,
        "stale_bytes": sum(file.num_bytes for file in entry.stale),
    }


def main(arguments: list[str] | None = None) -> int:
    """The process."""
    parser = argparse.ArgumentParser(prog="python -m engine.models.cache_contents")
    parser.add_argument("root", type=Path, metavar="ROOT", help="the shard cache")
    parser.add_argument("--prune", action="store_true", help="remove what nobody uses until the bound holds")
    parser.add_argument(
        "--keep", type=int, metavar="BYTES", help="with --prune: until no more than this is left"
    )
    parser.add_argument("--dry-run", action="store_true", help="with --prune: remove nothing")
    options = parser.parse_args(arguments)
    try:
        if options.prune:
            answer = prune(options.root, options.keep, options.dry_run)
        else:
            answer = contents(options.root)
    except (ModelError, OSError) as error:
        print(json.dumps({"error": str(error)}))
        return 2
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
