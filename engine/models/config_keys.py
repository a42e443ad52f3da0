"""Keys of a JSON file of a model folder, checked as they are taken: every refusal names file, key and value.

Called by `config`, `families` and `rope_config`. Imports no torch.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from engine.models.errors import ModelError


class Keys:
    """One JSON object of a file. A key that is missing or null takes the default; without one it is refused."""

    def __init__(self, file: Path, data: dict[str, Any]) -> None:
        self.file = file
        self.data = data

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        value = self._value(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ModelError(
                f"{self.file}: {key} is {value!r}; it has to be a whole number of at least {minimum}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if not _is_positive(value):
            raise ModelError(f"{self.file}: {key} is {value!r}; it has to be a number above 0")
        return float(value)

    def optional_number(self, key: str, missing: float | None = None) -> float | None:
        """`missing` for a key that is not there, None for one that is null."""
        return missing if key not in self.data else None if self.data[key] is None else self.number(key)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        values = self._value(key, None)
        if not isinstance(values, list) or len(values) != count or not all(map(_is_positive, values)):
            raise ModelError(f"{self.file}: {key} has to be a list of {count} numbers above 0")
        return tuple(map(float, values))

    def boolean(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise ModelError(f"{self.file}: {key} is {value!r}; it has to be true or false")
        return value

    def choices(self, key: str, allowed: tuple[Any, ...], count: int) -> tuple[Any, ...] | None:
        """A list of at least `count` of the allowed values, of which the first `count` matter; None without
        the key."""
        values = self.data.get(key)
        if values is None:
            return None
        if not isinstance(values, list) or len(values) < count:
            raise ModelError(f"{self.file}: {key} has to be a list of {count} entries, one for each layer")
        for value in values:
            if value not in allowed:
                names = ", ".join(map(str, allowed))
                raise ModelError(f"{self.file}: {key} holds {value!r}; supported are {names}")
        return tuple(values[:count])

    def token_ids(self, key: str, vocab_size: int) -> list[int]:
        value = self.data.get(key)
        if value is None:
            return []
        ids = value if isinstance(value, list) else [value]
        # -1 stands for "none" in files that older tools wrote.
        ids = [token for token in ids if token != -1]
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise ModelError(
                    f"{self.file}: {key} holds {token!r}; a token id lies between 0 and {vocab_size - 1}"
                )
        return ids

    def _value(self, key: str, default: Any) -> Any:
        value = self.data.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.file}: {key} is missing")
        return value


def read_keys(file: Path) -> Keys:
    """The keys of a JSON file. Raises ModelError for one that cannot be read, or holds something else."""
    try:
        data = json.loads(file.read_bytes())
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{file} does not hold a JSON object")
    return Keys(file, data)


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0
