"""`phalanx keys add|list|revoke`: the file of API keys, which running deployments read again by themselves. Called by
`cli`; must never show a key but the one that it has just made."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import LauncherError

if TYPE_CHECKING:
    from gateway.key_file import KeyRecord

_FILE_VARIABLE = "PHALANX_API_KEY_FILE"


def default_key_file() -> Path:
    """Beside other settings of the user."""
    if given := os.environ.get(_FILE_VARIABLE):
        return Path(given)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "phalanx" / "keys.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions and their flags."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, help="what to do")
    add = actions.add_parser("add", help="make a key and show it, once")
    add.add_argument("name", metavar="NAME", help="who gets it, for logs and for revoke")
    add.add_argument("--requests-per-minute", type=int, metavar="N", help="default: no limit")
    add.add_argument(
        "--tokens-per-minute", type=int, metavar="N", help="of prompts and answers; default: no limit"
    )
    listing = actions.add_parser("list", help="show names and limits")
    revoke = actions.add_parser("revoke", help="make a key worthless")
    revoke.add_argument("name", metavar="NAME", help="its name, or its id")
    for action in (add, listing, revoke):
        action.add_argument(
            "--file", type=Path, default=default_key_file(), help="default: %(default)s", metavar="FILE"
        )


def keys(options: argparse.Namespace) -> int:
    """Runs one action. Raises LauncherError."""
    from gateway.key_file import KeyFileError, load, make_key, save  # not for --help

    path: Path = options.file
    try:
        records = load(path) if path.exists() or options.action != "add" else []
        if options.action == "list":
            for record in records:
                print(_line(record))
        elif options.action == "revoke":
            left = [record for record in records if options.name not in (record.name, record.id)]
            if len(left) == len(records):
                raise LauncherError(f"{path} has no key {options.name!r}; see `phalanx keys list`")
            save(path, left)
            print(f"revoked {len(records) - len(left)} of {len(records)} keys in {path}")
        else:
            if any(record.name == options.name for record in records):
                raise LauncherError(f"{path} has a key {options.name!r}; revoke it or choose another name")
            key, record = make_key(options.name, options.requests_per_minute, options.tokens_per_minute)
            save(path, [*records, record])
            print(key)
    except KeyFileError as error:
        raise LauncherError(str(error)) from None
    return 0


def _line(record: KeyRecord) -> str:
    made = time.strftime("%Y-%m-%d", time.gmtime(record.created))
    limits = f"requests/min {record.requests_per_minute or '-'}  tokens/min {record.tokens_per_minute or '-'}"
    return f"{record.id}  {record.name:20}  made {made}  {limits}"
