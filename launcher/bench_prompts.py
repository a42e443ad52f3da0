"""What `phalanx bench` asks: prompts of a wanted length, or those of a file. Reads files; asks nobody."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import SettingsError

DATASETS = ("random", "sharegpt", "prompts")
# Words that are one token, with the space before them, for the tokenizers of nearly all models.
_COMMON = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or "
    "had an they which one you were her all she there would their we him been has when who will more "
    "no if out so said what up its about into than them can only other new some could time these two "
    "may then do first any my now such like our over man me even most made after also did many "
    "before must through back years where much your way well down"
)
_WORDS = _COMMON.split()


@dataclass(frozen=True)
class Ask:
    """One request."""

    prompt: str
    output_len: int


def make_asks(
    dataset: str, path: Path | None, count: int, input_len: int, output_len: int | None, seed: int
) -> list[Ask]:
    """`count` of them; a file with fewer is gone through again. Raises SettingsError."""
    generator = random.Random(seed)
    if dataset == "random":
        if path is not None:
            raise SettingsError("--dataset-path goes with --dataset sharegpt or prompts")
        words = [generator.choices(_WORDS, k=input_len) for _ in range(count)]
        return [Ask(" ".join(some), output_len or 128) for some in words]
    if path is None:
        raise SettingsError(f"--dataset {dataset} needs --dataset-path FILE")
    try:
        found = _sharegpt(path) if dataset == "sharegpt" else _lines(path)
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise SettingsError(f"--dataset-path {path}: {error}") from None
    if not found:
        raise SettingsError(f"--dataset-path {path}: it holds no prompt")
    generator.shuffle(found)
    asks = [found[number % len(found)] for number in range(count)]
    return [Ask(ask.prompt, output_len or ask.output_len) for ask in asks]


def _sharegpt(path: Path) -> list[Ask]:
    """The first question of each conversation, and about as many tokens as its answer had."""
    asks = []
    for entry in json.loads(path.read_text()):
        turns = entry.get("conversations", entry.get("conversation", []))
        if len(turns) >= 2 and turns[0].get("value"):
            answer = str(turns[1].get("value", ""))
            asks.append(Ask(str(turns[0]["value"]), max(4, len(answer.split()) * 4 // 3)))
    return asks


def _lines(path: Path) -> list[Ask]:
    """A prompt a line, as text, or as JSON with `prompt` and maybe `output_len`."""
    asks = []
    for line in path.read_text().splitlines():
        if not line.strip():
            continue
        entry: Any = json.loads(line) if line.lstrip().startswith("{") else {"prompt": line}
        if not isinstance(entry.get("prompt"), str):
            raise ValueError(f"a line without a prompt: {line[:60]}")
        asks.append(Ask(entry["prompt"], int(entry.get("output_len", 128))))
    return asks
