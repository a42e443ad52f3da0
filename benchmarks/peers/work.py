"""The work that every engine is given, and how a peer is told of it. Imported by the peers' processes too, so it
needs the standard library alone and runs on whatever Python they have."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

Generate = Callable[[int, int, int], float]
"""(sequences, prompt tokens, new tokens) -> seconds."""

WARM_UP = (2, 64, 4)


def prompt(sequence: int, length: int, salt: int = 0) -> list[int]:
    """Ordinary token ids, other ones for each sequence and salt."""
    return [100 + (7919 * (sequence + 1) * (index + 1) + 104729 * salt) % 40000 for index in range(length)]


def prompts(sequences: int, length: int, salt: int) -> list[list[int]]:
    """Never the same twice for another salt: nothing is to be found in a prefix cache."""
    return [prompt(sequence, length, salt) for sequence in range(sequences)]


def answer(make: Callable[[], Callable[[list[list[int]], int], int]]) -> None:
    """A peer's process: loads, says `ready`, then answers each line `sequences prompt_tokens new_tokens` on
    standard input with the seconds that it took. `make` gives a function (prompts, new tokens) -> tokens made."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine and its children print goes elsewhere
    generate = make()
    generate(prompts(*WARM_UP[:2], salt=999_983), WARM_UP[2])
    print("ready", file=out, flush=True)
    for salt, line in enumerate(sys.stdin):
        sequences, prompt_tokens, new_tokens = map(int, line.split())
        ids = prompts(sequences, prompt_tokens, salt)
        begin = time.perf_counter()
        made = generate(ids, new_tokens)
        seconds = time.perf_counter() - begin
        if made != sequences * new_tokens:
            raise RuntimeError(f"{made} tokens instead of {sequences * new_tokens}")
        print(seconds, file=out, flush=True)
