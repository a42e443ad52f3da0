"""Phalanx for Python: serve a model from a script, or generate offline. Both start the processes that
`phalanx serve` starts, and end them.

    import phalanx

    with phalanx.serve("smollm2-135m-instruct", tp=2) as server:
        print(server.url)

    with phalanx.LLM("smollm2-135m-instruct", tp=2) as llm:
        print(llm.generate(["Once upon a time"], phalanx.SamplingParams(max_tokens=32))[0].text)
        print(llm.embed(["a cat", "a dog"], kind="mean"))
        print(llm.score("The capital of France is", [" Paris", " Rome"]))
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal

from gateway.client import AsyncClient, Client, Stream
from gateway.errors import RequestFailed
from gateway.generation import Generation, Prompt, numbers_of, scored
from gateway.protocol import Pooling, SamplingParams
from launcher.owner import OWNER_VARIABLE

__all__ = [
    "LLM",
    "AsyncClient",
    "Client",
    "Generation",
    "Pooling",
    "RequestFailed",
    "SamplingParams",
    "Server",
    "ServerError",
    "serve",
]

_READY = re.compile(r"^ready  (?P<url>\S+)  zmq (?P<zmq>\S+)  model (?P<model>\S+)")
_STOP_TIMEOUT_S = 30.0
MAX_IN_FLIGHT = 256
"""Prompts that LLM.generate has with the server at a time."""


class ServerError(Exception):
    """The server did not start, or is gone. The text ends with the last lines that it printed."""


class Server:
    """A deployment of its own: supervisor, front and world, until `close`."""

    def __init__(self, model: str | Path, *, show_progress: bool = False, **options: object) -> None:
        """Starts `phalanx serve` and waits until it is ready.

        `options` are the flags of `phalanx serve` with underscores: `tp=2`, `dtype="float32"`. Ports are free
        ones unless they are given. Raises ServerError.
        """
        self._scratch = None if "run_dir" in options else tempfile.mkdtemp(prefix="phalanx-")
        defaults = {"port": 0, "zmq": "tcp://127.0.0.1:*", "grpc_port": 0}
        if self._scratch is not None:
            defaults["run_dir"] = str(Path(self._scratch, "run"))
        command = [sys.executable, "-m", "launcher.cli", "serve", str(model)]
        for name, value in {**defaults, **options}.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                command.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                command += [f"--{flag}", str(value)]
        self._last_lines: deque[str] = deque(maxlen=20)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if show_progress else subprocess.PIPE,
            text=True,
            # Killed, hung up on or restarted as a notebook's kernel is, this process could close nothing.
            env={**os.environ, OWNER_VARIABLE: str(os.getpid())},
            # Ctrl-C is for the caller, who closes the server in order.
            start_new_session=True,
        )
        if self._process.stderr is not None:
            threading.Thread(
                target=self._last_lines.extend, args=(self._process.stderr,), daemon=True
            ).start()
        assert self._process.stdout is not None
        ready = None
        try:
            while ready is None and (line := self._process.stdout.readline()):
                ready = _READY.match(line)
        except BaseException:
            self.close()
            raise
        if ready is None:
            code = self._process.wait()
            self.close()
            raise ServerError(f"phalanx serve ended with exit code {code}\n" + "".join(self._last_lines))
        # Nobody reads on: drained, so that the server never waits for us.
        threading.Thread(target=deque, args=(self._process.stdout, 0), daemon=True).start()
        self.url = ready["url"]
        """Base of the HTTP interfaces, without a path."""
        self.zmq = ready["zmq"]
        """ZeroMQ endpoint of the front."""
        self.model = ready["model"]
        """The name that requests give."""

    def client(self) -> Client:
        """A ZeroMQ client of this server, to be used as a context manager."""
        return Client(self.zmq)

    def close(self) -> None:
        """Stops every process and waits for the end. Raises ServerError if they had ended by themselves."""
        code = self._process.poll()
        if code is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        if code:
            raise ServerError(f"phalanx serve had ended with exit code {code}\n" + "".join(self._last_lines))

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            # The error that is under way says more than how the server took it.
            with contextlib.suppress(ServerError):
                self.close()


def serve(model: str | Path, *, show_progress: bool = False, **options: object) -> Server:
    """Serves a model until the returned server is closed; see Server."""
    return Server(model, show_progress=show_progress, **options)


class LLM:
    """Offline use: generate, embed, score. A server of its own, and a client."""

    def __init__(self, model: str | Path, *, show_progress: bool = False, **options: object) -> None:
        """See Server; no spare is kept unless `spare` asks for one. Raises ServerError."""
        # Nobody else asks this server: what is in flight here may wait there, however long the prompts are, and
        # nobody waits for single tokens.
        defaults = {"spare": "none", "max_waiting_tokens": 2**31, "step_factor": 0}
        self._server = serve(model, show_progress=show_progress, **{**defaults, **options})
        try:
            self._client = self._server.client()
            self._client.connect()
        except BaseException:
            self._server.close()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
        show_progress: bool = True,
    ) -> list[Generation]:
        """One generation for each prompt (text or token ids), in their order.

        Up to MAX_IN_FLIGHT prompts are with the server at a time; the world batches them. Raises RequestFailed for
        a prompt that is refused.
        """
        asks = [partial(self._client.submit, prompt, params, stop=stop) for prompt in _listed(prompts)]
        return self._collect(asks, "generate", show_progress)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        kind: Literal["last", "mean"] = "last",
        normalize: bool = True,
        show_progress: bool = True,
    ) -> list[list[float]]:
        """Each prompt (text or token ids) as `hidden_size` numbers: the hidden state of its last token after the
        model's final norm, or the mean over all its tokens; divided by its length if `normalize`. Raises
        RequestFailed for a prompt that is refused."""
        params = SamplingParams(pooling=Pooling(kind, normalize))
        asks = [partial(self._client.submit, prompt, params) for prompt in _listed(prompts)]
        return [numbers_of(done) for done in self._collect(asks, "embed", show_progress)]

    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        continuations: Prompt | Sequence[Prompt],
        *,
        show_progress: bool = True,
    ) -> list[list[float]]:
        """The log-probability of each token of a continuation behind its prompt; nothing is generated. One prompt
        goes with all continuations, else there must be as many; a pair is text, tokenized each by itself, or token
        ids. Raises ValueError, and RequestFailed for a pair that is refused."""
        many, behind = _listed(prompts), _listed(continuations)
        if len(many) == 1:
            many *= len(behind)
        if len(many) != len(behind):
            raise ValueError(
                f"{len(many)} prompts and {len(behind)} continuations; give as many, or one prompt"
            )
        pairs = [scored(prompt, continuation) for prompt, continuation in zip(many, behind, strict=True)]
        asks = [partial(self._client.submit, **pair) for pair in pairs]
        return [numbers_of(done) for done in self._collect(asks, "score", show_progress)]

    def _collect(
        self, asks: Sequence[Callable[[], Stream]], what: str, show_progress: bool
    ) -> list[Generation]:
        """Asks for all, MAX_IN_FLIGHT at a time, and waits for their ends, in their order."""
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
        todo = deque(asks)
        in_flight: deque[Stream] = deque()
        done: list[Generation] = []
        with Progress(*columns, disable=not show_progress, transient=True) as progress:
            task = progress.add_task(what, total=len(asks))
            try:
                while todo or in_flight:
                    while todo and len(in_flight) < MAX_IN_FLIGHT:
                        in_flight.append(todo.popleft()())
                    done.append(in_flight[0].collect())
                    in_flight.popleft()
                    progress.advance(task)
            except BaseException:
                for stream in in_flight:
                    stream.cancel()
                raise
        return done

    def close(self) -> None:
        """Ends the client and the server."""
        self._client.close()
        self._server.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list."""
    if isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
