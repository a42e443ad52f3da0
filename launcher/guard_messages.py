"""The messages between guard and supervisor: JSON objects that are checked type by type. Called by both; it uses the
standard library only, and must never let a frame through that is not a whole message."""

from __future__ import annotations

import json
import types
import typing
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, TypeVar

from launcher.leases import LEASE_S

MAX_MESSAGE_BYTES = 64 * 1024
"""Bound of one message between guard and supervisor."""


class MessageError(Exception):
    """A frame that is not a valid message of a guard or supervisor."""


_M = TypeVar("_M", bound="Message")


@dataclass(frozen=True)
class Message:
    """Base of all messages: JSON objects with a `type` key. Every one carries the epoch of its world."""

    type_name: ClassVar[str]

    epoch: int

    def to_bytes(self) -> bytes:
        """The frame of this message."""
        return json.dumps({"type": self.type_name, **vars(self)}, separators=(",", ":")).encode()


@dataclass(frozen=True)
class GuardHello(Message):
    """A guard's first message: who it is, and the process of its rank."""

    type_name: ClassVar[str] = "hello"

    rank: int
    host: str
    """Name of the machine, for people."""
    host_id: str
    """Equal exactly where process ids mean the same processes."""
    guard_pid: int
    guard_start: int
    """Start time in clock ticks since boot; with the pid it names a process for good."""
    pid: int
    start: int
    cores: str = ""
    """Processors that the rank may run on, like 0-3,8."""
    gpu: str = ""
    """The one that the rank would use; empty where there is none for it."""
    num_gpus: int = 0
    """Those that ranks of this host can see."""
    shm_bytes: int = -1
    """Size of the file system that holds shared memory; -1: not known."""
    shm_free_bytes: int = -1
    unix_s: float = 0.0
    """The time by this host's clock when this was sent; 0: not known."""


@dataclass(frozen=True)
class Beat(Message):
    """A guard's sign of life, every 50 ms (250 ms while the rank is parked) and at once when the phase or the
    endpoint changes."""

    type_name: ClassVar[str] = "beat"

    rank: int
    state: str
    """State letter of the rank's process from /proc: R, S, D, T, t, Z."""
    phase: int
    step: int
    collective: int
    age_s: float
    """Seconds since the rank last wrote to its progress page."""
    load_done: int
    load_total: int
    endpoint: str | None
    kv_blocks: int
    memory_bytes: int
    """Memory of a parked rank, its share of what it shares with other processes included; 0: not measured."""
    sent_s: float
    """When it was sent, by the guard's own monotonic clock."""
    delay_s: float = 0.0
    """By how much answers to beats were late lately; 0 on the supervisor's host, which sends none."""


@dataclass(frozen=True)
class RankFacts(Message):
    """What a rank has told its guard of itself (watch.FactSheet); sent again when there is more. Empty: not known."""

    type_name: ClassVar[str] = "facts"

    rank: int
    python: str = ""
    torch: str = ""
    mpi: str = ""
    """The library that is loaded, in its own words."""
    mpi4py: str = ""
    phalanx: str = ""
    """Version and digest of the code."""
    prefix: str = ""
    """Where its Python is installed."""
    model: str = ""
    """Folder of the model."""
    weights: str = ""
    config: str = ""
    """Beginnings of the hashes of their contents."""


@dataclass(frozen=True)
class FaultReport(Message):
    """A guard saw its rank end, or stop or hang for too long. Sent once."""

    type_name: ClassVar[str] = "fault"

    rank: int
    kind: str
    """exit, killed, frozen or hung."""
    exit_code: int | None
    """Of a rank that ended; -N for signal N."""
    detail: str
    """One sentence: what happened, and what the rank was doing."""
    detect_s: float
    """Seconds from the last sign of life to detection."""
    last_lines: str
    """End of the rank's output."""
    phase: int
    step: int
    collective: int
    age_s: float
    """What the rank was doing, as in Beat."""
    stacks: str
    """The rank's Python stacks; empty where they could not be had."""


@dataclass(frozen=True)
class Killed(Message):
    """A guard's answer to Kill: the rank is dead and reaped. The guard ends after it."""

    type_name: ClassVar[str] = "killed"

    rank: int


@dataclass(frozen=True)
class Kill(Message):
    """The supervisor's order to SIGKILL the rank and end. A guard obeys when `epoch` is its own or later."""

    type_name: ClassVar[str] = "kill"


@dataclass(frozen=True)
class Introduce(Message):
    """The supervisor's answer to a guard that it does not know: who it is itself, and that it wants a hello. So a
    new supervisor takes over the guards of one that was killed."""

    type_name: ClassVar[str] = "introduce"

    pid: int
    start: int
    host_id: str


@dataclass(frozen=True)
class Lease(Message):
    """The supervisor's answer to a beat of a guard on another host: the rank may live on for a while."""

    type_name: ClassVar[str] = "lease"

    sent_s: float
    """`Beat.sent_s` of that beat."""
    lease_s: float = LEASE_S
    """For how long from then on."""


@dataclass(frozen=True)
class Go(Message):
    """The supervisor's word to the guards of a spare: the rank is to go on and serve."""

    type_name: ClassVar[str] = "go"


_MESSAGES: dict[str, type[Message]] = {
    message.type_name: message
    for message in (GuardHello, Beat, RankFacts, FaultReport, Killed, Kill, Introduce, Lease, Go)
}


def _accepted_types(annotation: Any) -> tuple[type, ...]:
    accepted = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    # A whole number is a valid float in JSON; bool must never pass as int.
    return (*accepted, int) if float in accepted else tuple(accepted)


_FIELDS: dict[type[Message], dict[str, tuple[type, ...]]] = {
    message: {
        field.name: _accepted_types(typing.get_type_hints(message)[field.name]) for field in fields(message)
    }
    for message in _MESSAGES.values()
}


_OPTIONAL: dict[type[Message], frozenset[str]] = {
    message: frozenset(field.name for field in fields(message) if field.default is not MISSING)
    for message in _MESSAGES.values()
}


def from_bytes(frame: bytes) -> Message:
    """The message in a frame. An unknown key is ignored; anything missing or of a wrong type raises
    MessageError."""
    if len(frame) > MAX_MESSAGE_BYTES:
        raise MessageError(f"message of {len(frame)} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
    try:
        values = json.loads(frame)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise MessageError("not a JSON object")
    type_name = values.get("type")
    message = _MESSAGES.get(type_name) if isinstance(type_name, str) else None
    if message is None:
        raise MessageError(f"unknown message type {type_name!r}")
    arguments = {}
    for name, accepted in _FIELDS[message].items():
        if name not in values:
            if name in _OPTIONAL[message]:
                continue
            raise MessageError(f"{type_name}: {name} is missing")
        value = values[name]
        if type(value) not in accepted:
            raise MessageError(f"{type_name}: {name} is a {type(value).__name__}")
        arguments[name] = value
    return message(**arguments)
