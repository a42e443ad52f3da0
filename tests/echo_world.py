"""A world without a model, and a small supervisor, for tests of the front and of clients.

`python -m tests.echo_world` is a real rank 0 gateway whose "model" repeats the prompt: output token i is
prompt token (i + choice) modulo its length. So every token is known beforehand, whichever world makes it.
It honours output_token_ids, max_tokens, end tokens, stop_token_ids and cancels; its log-probabilities are those
of echo_logprobs. EchoCluster starts such
worlds and a real front, and speaks the supervisor's side of the control socket.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import msgspec
import zmq

from gateway.control_messages import (
    Fault,
    FrontState,
    RankEntry,
    WorldEntry,
    WorldTable,
    decode_control_message,
    encode_control_message,
)
from gateway.protocol import Cancel, FinishReason, Limits, Output, Pooling, Submit, TokenLogprobs
from gateway.rank0 import Rank0Gateway

ROOT = Path(__file__).parent.parent
VOCAB_SIZE = 300
END_TOKEN = 2
"""`<|im_end|>` of the tokenizer that write_text_folder makes."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def echo_token(prompt: list[int], position: int, choice: int = 0) -> int:
    """The token that every echo world gives at this position."""
    return prompt[(position + choice) % len(prompt)]


def echo_tokens(prompt: list[int], count: int, choice: int = 0) -> list[int]:
    return [echo_token(prompt, position, choice) for position in range(count)]


def echo_logprobs(token: int, num_top: int) -> TokenLogprobs:
    """What every echo world says of a token: -0.5, the likeliest; the ids behind it follow, each less by 1."""
    top = [(token + number) % VOCAB_SIZE for number in range(num_top)]
    return TokenLogprobs(token, -0.5, 1, top, [-0.5 - number for number in range(num_top)])


def echo_cached(num_prompt_tokens: int) -> int:
    """What every echo world says that it had of a prompt in its prefix cache."""
    return num_prompt_tokens // 2


HIDDEN_SIZE = 8


def echo_numbers(prompt: list[int], pooling: Pooling) -> list[float]:
    """What every echo world says of a prompt that is pooled: a direction of its last token and its length, of length
    1 or 3; or minus its token ids as scores."""
    if pooling.kind == "score":
        return [-float(token) for token in prompt[pooling.first_scored :]]
    length = 1.0 if pooling.normalize else 3.0
    angle = (prompt[-1] if pooling.kind == "last" else sum(prompt) / len(prompt)) / 100
    return [math.cos(angle) * length, math.sin(angle) * length, *[0.0] * (HIDDEN_SIZE - 2)]


def write_text_folder(folder: Path) -> Path:
    """Writes tokenizer.json and tokenizer_config.json of a byte-level tokenizer: three special tokens, one
    token for each byte, and a few longer ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ã", "©")]
    vocabulary = [*special, *alphabet, *(left + right for left, right in merges)]
    model = models.BPE({token: number for number, token in enumerate(vocabulary)}, merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": special[1], "eos_token": special[2], "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# --------------------------------------------------------------------------- the world


@dataclass
class _Sequence:
    submit: Submit
    output: list[int]

    def next_output(self) -> Output:
        params = self.submit.params
        if params.pooling is not None:
            numbers = echo_numbers(self.submit.prompt_token_ids, params.pooling)
            pooled = struct.pack(f"<{len(numbers)}f", *numbers)
            return Output(self.submit.request_id, 0, [], "stop", pooled=pooled)
        position = len(self.output)
        token = echo_token(self.submit.prompt_token_ids, position, params.choice)
        self.output.append(token)
        finish: FinishReason | None = None
        stop: int | None = None
        if token == END_TOKEN and not params.ignore_eos:
            finish = "stop"
        elif token in params.stop_token_ids:
            finish, stop = "stop", token
        elif len(self.output) >= params.max_tokens:
            finish = "length"
        cached = echo_cached(len(self.submit.prompt_token_ids)) if position == 0 else None
        output = Output(self.submit.request_id, position, [token], finish, stop, num_cached_tokens=cached)
        if params.logprobs is None and params.prompt_logprobs is None:
            return output
        logprobs = None if params.logprobs is None else [echo_logprobs(token, params.logprobs)]
        of_prompt = None
        if params.prompt_logprobs is not None and position == len(self.submit.output_token_ids):
            num_top = params.prompt_logprobs
            of_prompt = [echo_logprobs(token, num_top) for token in self.submit.prompt_token_ids[1:]]
        return msgspec.structs.replace(output, logprobs=logprobs, prompt_logprobs=of_prompt)


class EchoWorld:
    """The step loop of a world of one rank."""

    def __init__(self, endpoint: str, epoch: int, limits: Limits, step_s: float) -> None:
        self.gateway = Rank0Gateway(endpoint, epoch, "echo", 1, 1, limits, [END_TOKEN])
        self._step_s = step_s
        self._running: dict[tuple[bytes, str], _Sequence] = {}
        self._step = 0
        self.stopping = False

    def run(self) -> None:
        while not self.stopping:
            self.turn()
        self.gateway.close()

    def turn(self) -> None:
        """Receives, makes one token for every sequence, sends."""
        for client in self.gateway.lost_clients():
            for key in [key for key in self._running if key[0] == client]:
                del self._running[key]
        for client, message in self.gateway.receive(0 if self._running else 0.1):
            key = (client, message.request_id)
            if isinstance(message, Cancel):
                sequence = self._running.pop(key, None)
                if sequence is not None:
                    output = Output(message.request_id, len(sequence.output), [], "cancelled")
                    self.gateway.send_tokens(self._step, [(client, output)])
            else:
                self._running[key] = _Sequence(message, list(message.output_token_ids))
        if not self._running:
            self._report()
            return
        time.sleep(self._step_s)
        self._step += 1
        outputs = [(key[0], sequence.next_output()) for key, sequence in self._running.items()]
        for client, output in outputs:
            if output.finish_reason is not None:
                del self._running[client, output.request_id]
        self.gateway.send_tokens(self._step, outputs)
        self._report()

    def _report(self) -> None:
        running = len(self._running)
        self.gateway.send_stats(self._step, running, 0, running, 1000, 0, 0, self._step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--endpoint", default="tcp://127.0.0.1:*")
    parser.add_argument("--epoch", type=int, default=1)
    parser.add_argument("--step-s", type=float, default=0.005)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--kv-cache-tokens", type=int, default=65536)
    options = parser.parse_args()
    limits = Limits(options.max_model_len, options.kv_cache_tokens, 64, VOCAB_SIZE, HIDDEN_SIZE)
    world = EchoWorld(options.endpoint, options.epoch, limits, options.step_s)

    def stop(number: int, frame: FrameType | None) -> None:
        world.stopping = True

    signal.signal(signal.SIGTERM, stop)
    print(world.gateway.endpoint, flush=True)
    world.run()


# --------------------------------------------------------------------------- the supervisor's side


class EchoCluster:
    """A real front process over echo worlds, all as real processes. A context manager."""

    def __init__(
        self,
        run_dir: Path,
        *,
        model_dir: Path | None = None,
        step_s: float = 0.005,
        max_wait_s: float = 20.0,
        front_options: tuple[str, ...] = (),
        world_options: tuple[str, ...] = (),
    ) -> None:
        self.run_dir = run_dir
        self.model_dir = model_dir or write_text_folder(run_dir / "model")
        self.states: list[FrontState] = []
        self.epoch = 0
        self.worlds: dict[int, tuple[subprocess.Popen[str], WorldEntry]] = {}
        self.faults: list[Fault] = []
        self._driven: list[WorldEntry] = []
        self._step_s = step_s
        self._world_options = world_options
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.set(zmq.LINGER, 0)
        control = f"ipc://{run_dir}/control.sock"
        self._router.bind(control)
        self._front_identity: bytes | None = None
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._stopping = False
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._front_command = [
            *(sys.executable, "-m", "gateway.front"),
            *("--model-dir", str(self.model_dir), "--served-model-name", "echo"),
            *("--http-fd", str(self.listener.fileno()), "--zmq", "tcp://127.0.0.1:*"),
            *("--control", control, "--run-dir", str(run_dir), "--max-wait-s", str(max_wait_s)),
            *front_options,
        ]
        self.front_log = run_dir / "front.log"
        self.front = self._start_front()
        self._thread = threading.Thread(target=self._supervise, daemon=True)
        self._thread.start()

    def __enter__(self) -> EchoCluster:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopping = True
        self._thread.join(10)
        for epoch in list(self.worlds):
            self.kill_world(epoch)
        if self.front.poll() is None:
            self.front.terminate()
            try:
                self.front.wait(10)
            except subprocess.TimeoutExpired:
                self.front.kill()
                self.front.wait(10)
                raise
        self.listener.close()
        self._context.destroy(linger=0)

    def _start_front(self) -> subprocess.Popen[bytes]:
        with self.front_log.open("ab") as log:
            return subprocess.Popen(
                self._front_command,
                cwd=ROOT,
                pass_fds=[self.listener.fileno()],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def restart_front(self, *, kill: bool = True) -> None:
        """SIGKILLs the front, and starts the next one as the supervisor does. Returns at once."""
        if kill:
            self.front.kill()
        self.front.wait(10)
        self.states.clear()
        self._front_identity = None
        self.front = self._start_front()

    def start_world(self, *, state: str = "active", announce: bool = True) -> int:
        """Starts the next world; returns its epoch. It is in the table when this returns."""
        self.epoch += 1
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.echo_world", "--epoch", str(self.epoch)),
                *("--step-s", str(self._step_s), *self._world_options),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        gateway = process.stdout.readline().strip()
        assert gateway, "the echo world did not start"
        rank = RankEntry(0, 0, 0, "localhost", process.pid, os.getpid(), "idle", 0, 0.01)
        entry = WorldEntry(self.epoch, state, "echo", "1", 0, 1, 1, gateway, [rank])
        with self._lock:
            self.worlds[self.epoch] = (process, entry)
        if announce:
            self._changed.set()
        return self.epoch

    def announce_gateway(self, endpoint: str, epoch: int) -> None:
        """Puts a world into the table whose gateway somebody else drives."""
        self.epoch = max(self.epoch, epoch)
        rank = RankEntry(0, 0, 0, "localhost", os.getpid(), os.getpid(), "idle", 0, 0.01)
        with self._lock:
            self._driven = [WorldEntry(epoch, "active", "echo", "1", 0, 1, 1, endpoint, [rank])]
        self._changed.set()

    def kill_world(self, epoch: int | None = None, *, announce: bool = True) -> None:
        """SIGKILLs a world, the youngest by default, and takes it off the table."""
        with self._lock:
            process, _ = self.worlds[epoch or self.epoch]
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait(10)
        if announce:
            with self._lock:
                del self.worlds[epoch or self.epoch]
            self._changed.set()

    def freeze_world(self, epoch: int | None = None) -> None:
        """SIGSTOP: it says nothing, and its connections stay open."""
        self.worlds[epoch or self.epoch][0].send_signal(signal.SIGSTOP)

    def forget_world(self, epoch: int) -> subprocess.Popen[str]:
        """Takes a world off the table without ending it: a supervisor that could not reach it."""
        with self._lock:
            process, _ = self.worlds.pop(epoch)
        self._changed.set()
        return process

    def wait(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Waits for something; shows the front's log if it does not come."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline or self.front.poll() is not None:
                raise AssertionError(f"it did not happen; the front's log:\n{self.front_log.read_text()}")
            time.sleep(0.01)

    def wait_serving(self, epoch: int | None) -> None:
        """Waits until the front says that this epoch serves it."""
        self.wait(lambda: bool(self.states) and self.states[-1].serving_epoch == epoch)

    @property
    def zmq(self) -> str:
        """Where the front's ZeroMQ clients connect."""
        self.wait(lambda: bool(self.states))
        return self.states[-1].zmq

    @property
    def grpc(self) -> str:
        """Where gRPC clients connect, if the front was started with --grpc."""
        self.wait(lambda: bool(self.states) and self.states[-1].grpc is not None)
        return self.states[-1].grpc or ""

    def get(self, path: str) -> tuple[int, bytes]:
        """GET from the front: status and body."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def _table(self) -> WorldTable:
        with self._lock:
            entries = [*(entry for _, entry in self.worlds.values()), *self._driven]
        return WorldTable(self.epoch, entries, self.faults)

    def _supervise(self) -> None:
        """Sends tables, on changes and every 100 ms; notes what the front says."""
        next_table = 0.0
        while not self._stopping:
            while self._router.poll(5):
                identity, frame = self._router.recv_multipart()
                message = decode_control_message(frame)
                assert isinstance(message, FrontState)
                self._front_identity = identity
                self.states.append(message)
            if self._front_identity and (self._changed.is_set() or time.monotonic() >= next_table):
                self._changed.clear()
                next_table = time.monotonic() + 0.1
                self._router.send_multipart([self._front_identity, encode_control_message(self._table())])


if __name__ == "__main__":
    main()
