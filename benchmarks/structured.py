"""What structured output costs: time between tokens of 32 streams, with a JSON schema and without.

`python -m benchmarks.structured [--rounds N] [--tp N] [--pp N]`. The peer in the same run is the same streams without
the schema, round about.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from itertools import pairwise

import llguidance

from benchmarks.common import bare_world, machine, model_folder, percentile, pin, show, write
from benchmarks.peers.work import prompt
from gateway.client import Client
from gateway.protocol import SamplingParams

STREAMS = 32
TOKENS = 96
SCHEMA = {
    "type": "array",
    "minItems": 40,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 8, "maxLength": 40},
            "age": {"type": "integer"},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=1)
    arguments = parser.parse_args()
    cores = pin(arguments.cores)
    overrides = {"whitespace_pattern": "[ \\n]?"}
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA), overrides=overrides)  # type: ignore[arg-type]
    found: dict[str, list[float]] = {"plain": [], "schema": []}
    with bare_world(model_folder(), arguments.tp, arguments.pp) as endpoint, Client(endpoint) as client:
        for salt in range(arguments.rounds + 1):
            for name, text in (("plain", None), ("schema", grammar)):
                seconds = _round(client, salt, text)
                if salt:  # the first one warms up
                    found[name] += seconds
    milliseconds = {
        name: {"p50": percentile(values, 0.5) * 1e3, "p90": percentile(values, 0.9) * 1e3}
        for name, values in found.items()
    }
    ratio = milliseconds["schema"]["p50"] / milliseconds["plain"]["p50"]
    rows: list[list[object]] = [[name, *values.values()] for name, values in milliseconds.items()]
    show(f"time between tokens of {STREAMS} streams, ms; ratio of p50 {ratio:.3f}", ["", "p50", "p90"], rows)
    write(
        "structured",
        {
            "machine": machine(cores),
            "load": os.getloadavg(),
            "tp": arguments.tp,
            "pp": arguments.pp,
            "streams": STREAMS,
            "milliseconds": milliseconds,
            "ratio_p50": ratio,
        },
    )


def _round(client: Client, salt: int, grammar: str | None) -> list[float]:
    """Seconds between tokens, once all streams have begun."""
    arrivals: list[list[float]] = [[] for _ in range(STREAMS)]
    streams = [
        client.submit(
            prompt(index, 16, salt),
            SamplingParams(max_tokens=TOKENS, temperature=0.8, seed=index, ignore_eos=True, grammar=grammar),
        )
        for index in range(STREAMS)
    ]

    def read(index: int) -> None:
        arrivals[index] += [time.perf_counter() for _ in streams[index]]

    readers = [threading.Thread(target=read, args=(index,)) for index in range(STREAMS)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    begun = max(times[0] for times in arrivals)
    return [later - earlier for times in arrivals for earlier, later in pairwise(times) if earlier > begun]


if __name__ == "__main__":
    main()
