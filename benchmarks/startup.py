"""From `phalanx serve` to ready and to the first token: once with an empty model cache, then several times with it.

`python -m benchmarks.startup [--tp N] [--starts N] [--cores N]`. The download of the model's wheel is left out. The
parts of a start are taken from what the supervisor says on standard error, as it says it; a guard looks at its rank
every 10 ms, and a part that is shorter counts into the one before it. Peers in the same run, in turn: a bare `import
torch`, and transformers from start to its first token with the same weights. "Later" means that the files are in the
page cache of the system, as they are when a world is started again.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from benchmarks.common import MODEL, ROOT, machine, median, model_folder, pin, show, write
from engine.models.catalog import CATALOG, default_cache_folder

READY_TARGET_S = 6.0
"""For a later start."""
TIMEOUT_S = 300.0

PROMPT = "Once upon a time"

PARTS = {
    "prepare": "supervisor up, model checked; the first time imported from GGUF",
    "start": "mpirun, guards, interpreters of the ranks",
    "import": "torch",
    "join": "MPI",
    "load": "weights mapped; the first time cut into shards",
    "front": "the front meets rank 0",
    "first token": "one request over HTTP",
}
_SAYS = (
    ("start", re.compile(r"world \d+: \d+ ranks? starting")),
    ("import", re.compile(r"world \d+: \d+ ranks? importing")),
    ("join", re.compile(r"world \d+: \d+ ranks? joining")),
    ("load", re.compile(r"load: ")),
    ("front", re.compile(r"world \d+: \d+ ranks? waiting for the front")),
)
"""What is said when a part begins."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--starts", type=int, default=5, help="later starts")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--transformers", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.transformers:
        _transformers(arguments.transformers)
        return
    folder = model_folder()
    cores = pin(arguments.cores)
    later: list[dict[str, float]] = []
    peers: dict[str, list[float]] = {"import torch": [], "transformers": []}
    with tempfile.TemporaryDirectory(prefix="phalanx-bench-") as cache:
        _seed_wheel(Path(cache))
        first = _start(Path(cache), arguments.tp)
        print(f"first start: ready after {first['ready']:.1f} s", file=sys.stderr)
        for number in range(arguments.starts):
            later.append(_start(Path(cache), arguments.tp))
            peers["import torch"].append(_run(["-c", "import torch"]))
            peers["transformers"].append(_run(["-m", "benchmarks.startup", "--transformers", str(folder)]))
            print(
                f"start {number + 1} of {arguments.starts}: ready after {later[-1]['ready']:.1f} s",
                file=sys.stderr,
            )
    _report(first, later, peers, cores, arguments.tp)


def _seed_wheel(cache: Path) -> None:
    """Puts the model's wheel where a download would have put it; without one, the first start has its GGUF file
    from an installed package."""
    wheel = default_cache_folder() / "downloads" / CATALOG[MODEL].parts[0].wheel
    if wheel.is_file():
        (cache / "downloads").mkdir()
        shutil.copy(wheel, cache / "downloads")


def _start(cache: Path, tp: int) -> dict[str, float]:
    """One start and stop. Seconds of each part; `ready` and `first` are moments, from the start on."""
    with tempfile.TemporaryDirectory(prefix="phalanx-bench-") as run_dir:
        command = [sys.executable, "-m", "launcher.cli", "serve", MODEL, "--tp", str(tp), "--port", "0"]
        command += ["--zmq", "tcp://127.0.0.1:*", "--run-dir", str(Path(run_dir, "run"))]
        begin = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PHALANX_CACHE": str(cache)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None and process.stderr is not None
        begun = {"prepare": 0.0}
        said: list[str] = []
        listener = threading.Thread(target=_listen, args=(process.stderr, begin, begun, said), daemon=True)
        listener.start()
        watchdog = threading.Timer(TIMEOUT_S, process.kill)
        watchdog.start()
        try:
            line = process.stdout.readline()
            ready = time.perf_counter() - begin
            if not line.startswith("ready"):
                raise RuntimeError(f"phalanx serve did not start:\n{''.join(said)}")
            _, url, _, _, _, model, *_ = line.split()
            _ask_one_token(url, model)
            first = time.perf_counter() - begin
        finally:
            watchdog.cancel()
            process.terminate()
            process.wait()
            listener.join()
            process.stdout.close()
            process.stderr.close()
    return {**_lengths(begun, ready), "first token": first - ready, "ready": ready, "first": first}


def _listen(stream: IO[str], begin: float, begun: dict[str, float], said: list[str]) -> None:
    """Notes when each part began."""
    for line in stream:
        now = time.perf_counter() - begin
        said.append(line)
        for part, pattern in _SAYS:
            if pattern.match(line):
                begun.setdefault(part, now)


def _lengths(begun: dict[str, float], ready: float) -> dict[str, float]:
    """Seconds of each part up to `ready`, from the moments at which they began."""
    ordered = sorted(begun.items(), key=lambda item: item[1])
    ends = [moment for _, moment in ordered[1:]] + [ready]
    lengths = dict.fromkeys((part for part in PARTS if part != "first token"), 0.0)
    return {**lengths, **{part: end - at for (part, at), end in zip(ordered, ends, strict=True)}}


def _ask_one_token(url: str, model: str) -> None:
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.netloc, timeout=TIMEOUT_S)
    body = json.dumps({"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    if answer.status != 200:
        raise RuntimeError(f"HTTP {answer.status}: {content}")


# --------------------------------------------------------------------------- the peers


def _run(arguments: list[str]) -> float:
    """Seconds until a Python process has done its work."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True, timeout=TIMEOUT_S)
    return time.perf_counter() - begin


def _transformers(folder: str) -> None:
    """A process of its own: what a user would write to get one token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=1, do_sample=False)
    sys.stdout.flush()
    os._exit(0)  # what comes after the first token is not waited for


# --------------------------------------------------------------------------- the report


def _report(
    first: dict[str, float],
    later: list[dict[str, float]],
    peers: dict[str, list[float]],
    cores: list[int],
    tp: int,
) -> None:
    medians = {part: median([start[part] for start in later]) for part in first}
    rows: list[list[object]] = [
        [f"{part}: {what}", first[part], medians[part]] for part, what in PARTS.items()
    ]
    rows.insert(-1, ["ready", first["ready"], medians["ready"]])
    rows.append(["first token, from the start on", first["first"], medians["first"]])
    show(f"phalanx serve {MODEL}, tp {tp}, {len(cores)} cores, seconds", ["", "first", "later"], rows)
    to_first_token = [start["first"] for start in later]
    ratios = {
        "transformers": _ratio(to_first_token, peers["transformers"]),
        "import torch": _ratio([start["ready"] for start in later], peers["import torch"]),
    }
    show(
        f"peers, seconds, medians of {len(later)}",
        ["", "peer", "phalanx, later", "ratio"],
        [
            ["transformers, to the first token", median(peers["transformers"]), medians["first"],
             ratios["transformers"]],
            ["import torch; phalanx to ready", median(peers["import torch"]), medians["ready"],
             ratios["import torch"]],
        ],
    )  # fmt: skip
    met = "met" if medians["ready"] < READY_TARGET_S else "MISSED"
    print(f"target: a later start is ready in under {READY_TARGET_S:.0f} s: {met}")
    write(
        "startup",
        {
            "machine": machine(cores), "tp": tp, "target_ready_s": READY_TARGET_S, "parts": PARTS,
            "first_s": first, "later_median_s": medians, "later_s": later, "peers_s": peers,
            "ratio_to_peers": ratios,
        },
    )  # fmt: skip


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return median([mine / other for mine, other in zip(ours, theirs, strict=True)])


if __name__ == "__main__":
    main()
