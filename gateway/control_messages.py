"""The messages that the supervisor and the front exchange over the control socket, and their encoding.

As protocol.py, of which it is a part: the front and the supervisor may import it, and it imports nothing else of the
project. The launcher knows what is in these two modules of the gateway, and no more of it.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from gateway.protocol import decode_frame


def of_front(name: str, front: int) -> str:
    """A front's own file or socket in the run folder; the names of the first one have no number."""
    stem, dot, suffix = name.partition(".")
    return f"{stem}-{front}{dot}{suffix}" if front else name


class RankEntry(Struct, frozen=True):
    """One rank as `/cluster` shows it."""

    rank: int
    tp: int
    pp: int
    host: str
    pid: int
    guard_pid: int
    state: str
    """Phase from the rank's progress page: starting, importing, joining, loading, parked, idle, stepping, ..."""
    step: int
    heartbeat_age_s: float
    memory_bytes: int = 0
    """What it holds of the host's memory: of a parked spare its proportional share (PSS), else its resident pages; 0:
    not measured."""


class WorldEntry(Struct, frozen=True):
    """One living world. `state` is starting, active, spare or dying; dead worlds are not listed."""

    epoch: int
    state: str
    model: str
    version: str
    replica: int
    tp: int
    pp: int
    gateway: str | None
    """ZeroMQ endpoint of rank 0, once it listens."""
    ranks: list[RankEntry]
    spare: str | None = None
    """Of a spare its kind, warm or hot; None once it is promoted."""


class HostEntry(Struct, frozen=True):
    """A host of `--hosts`."""

    name: str
    slots: int
    """How many ranks of a world it may hold."""
    state: str
    """in use; spare: ready for the next world; lost: it cannot be reached; left out: several faults lately."""
    since: float | None = None
    """Unix time at which it was lost."""
    detail: str | None = None


MOST_IN_FLIGHT_IDS = 10


class Fault(Struct, frozen=True):
    """What is known of one fault: the post-mortem record that `/cluster`, log and metrics show."""

    epoch: int
    at: float
    """Unix time in seconds."""
    kind: str
    """exit, killed, frozen, hung, lost, mpirun, start."""
    rank: int | None
    host: str | None
    detail: str
    """One sentence for a person: signal or exit code, and what the rank was doing."""
    detect_s: float | None = None
    """Seconds from the last sign of life to detection."""
    recover_s: float | None = None
    """Seconds from detection until a world served again; None while none does."""
    signal: str | None = None
    """Name of the signal that ended the rank, like SIGSEGV."""
    phase: str | None = None
    """What the rank was doing, as in RankEntry.state."""
    exit_code: int | None = None
    """Of a rank that ended by itself."""
    tp: int | None = None
    pp: int | None = None
    """The rank's place in the world."""
    pid: int | None = None
    step: int | None = None
    """The last step that the rank began, and the collectives that it had begun in it."""
    collective: int | None = None
    progress_age_s: float | None = None
    """Seconds since the rank had last shown progress."""
    last_lines: str = ""
    """End of the rank's output, or of mpirun's."""
    stacks: str = ""
    """The rank's Python stacks, where they could be had: of an exception, of a fatal signal, of a hang."""
    abort_s: float | None = None
    """Seconds from detection until no process of the world was left."""
    resume_s: float | None = None
    """Seconds from detection until the first request that went on had a new token; None if there was none."""
    in_flight: int | None = None
    """Requests that the world had; None while the front has not said so, or where the world had not served."""
    in_flight_ids: tuple[str, ...] = ()
    """Of the first calls that these are of, as their clients know them."""


class Claim(Struct, frozen=True):
    """One of several fronts has a world for itself, to try a request that may be what kills worlds."""

    front: int
    epoch: int
    is_alone: bool
    """All others have said that they are out of it."""


class WorldTable(Struct, frozen=True, tag="world_table", tag_field="type"):
    """The supervisor's view, sent to the front on every change and at least every 250 ms."""

    epoch: int
    """The highest epoch handed out; messages of lower ones are dropped unless their world is listed."""
    worlds: list[WorldEntry]
    """Active worlds first, then starting ones, then spares."""
    faults: list[Fault]
    """The last faults, newest first."""
    notice: str | None = None
    """What people who ask for the health should know: worlds that do not start, die soon, or are smaller than asked
    for."""
    claim: Claim | None = None
    """Whose turn it is to have the world for itself."""
    tp: int | None = None
    """What was asked for, which a world has fewer of while hosts are lost."""
    pp: int | None = None
    hosts: list[HostEntry] = []
    """Those of `--hosts`, in its order."""


class InFlight(Struct, frozen=True):
    """What a front had in a world when it lost it."""

    epoch: int
    count: int
    ids: tuple[str, ...]
    """Of the first MOST_IN_FLIGHT_IDS calls that these are of, in the order in which they were submitted."""


class FrontState(Struct, frozen=True, tag="front_state", tag_field="type"):
    """The front's word to the supervisor, once when it listens and whenever `serving_epoch` changes."""

    pid: int
    zmq: str
    """The ZeroMQ endpoint that clients use, with the port that was really bound."""
    serving_epoch: int | None
    """Epoch of the world whose gateway has welcomed the front; None while there is none."""
    resumed_at: float | None = None
    """Unix time at which the first replayed request of that epoch got a token again."""
    grpc: str | None = None
    """Address and port for gRPC clients; None while there is none."""
    notice: str | None = None
    """What whoever runs the server should know: a journal that could not be used."""
    claims: int | None = None
    """Epoch of the world that it wants for itself."""
    out_of: int | None = None
    """Epoch of the world in which it has nothing, and puts nothing, as long as another front claims it."""
    in_flight: InFlight | None = None
    """Of the last world that it lost."""


ControlMessage = WorldTable | FrontState

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ControlMessage)


def encode_control_message(message: ControlMessage) -> bytes:
    """The frame of a message."""
    return _encoder.encode(message)


def decode_control_message(frame: bytes) -> ControlMessage:
    """What supervisor or front sent each other. Raises ProtocolError."""
    return decode_frame(_decoder, frame)
