"""How the value of a setting is read: sizes, numbers and paths from the words of a command line, and all of a config
file. Called by `settings`; knows no setting by itself, but those that are sizes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.errors import SettingsError

_SIZES = ("kv_cache_memory", "journal_max_size", "max_body_size")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str | int) -> int:
    """Bytes of a size such as 2GiB, 512M, 1.5g or 1000000. K, M, G and T stand for powers of 1024, except in
    kB, MB, GB and TB, which mean powers of 1000. Raises ValueError."""
    match = _SIZE.fullmatch(str(text))
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it like 2GiB, 512MiB or a number of bytes")
    number, letter, suffix = match.groups()
    if suffix.lower() == "i":
        raise ValueError(f"{text!r} is not a size; write {number}{letter}iB")
    base = 1000 if letter and suffix.lower() == "b" else 1024
    return int(float(number) * base ** _POWERS[letter.lower()])


def read_config(path: Path, kinds: Mapping[str, str]) -> dict[str, Any]:
    """The settings of a config file. `kinds`: the types of all that there are, by name. Raises SettingsError that
    names the file, the key, and the nearest name for one that is unknown."""
    import yaml  # 20 ms that a start without a file does not pay

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise SettingsError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"--config {path}: must hold `name: value` lines")
    allowed = {name.replace("_", "-"): name for name in kinds}
    values = {}
    for key, value in content.items():
        name = allowed.get(str(key).replace("_", "-"))
        if name is None:
            nearest = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.0)
            raise SettingsError(f"--config {path}: unknown key {key!r}; did you mean {nearest[0]!r}?")
        if value is None:
            continue
        values[name] = convert(name, kinds[name], value, f"--config {path}: {key}: {value}")
    return values


def convert(name: str, kind: str, value: Any, where: str) -> Any:
    """The value of a setting of this type. Raises SettingsError that begins with `where` it stood."""
    if kind == "bool":
        if not isinstance(value, bool):
            raise SettingsError(f"{where}: must be true or false")
        return value
    if name == "journal" and value is False:
        return "off"  # as YAML reads it
    if isinstance(value, (bool, list, dict)):
        raise SettingsError(f"{where}: must be a single value")
    if name in _SIZES:
        try:
            return parse_size(value)
        except ValueError as error:
            raise SettingsError(f"{where}: {error}") from None
    try:
        if kind in ("int", "int | None"):
            return int(str(value))
        if kind in ("float", "float | None"):
            return float(value)
    except ValueError:
        wanted = "a number" if kind.startswith("float") else "a whole number"
        raise SettingsError(f"{where}: must be {wanted}") from None
    return Path(str(value)).expanduser() if kind == "Path | None" else str(value)
