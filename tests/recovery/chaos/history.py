"""What a chaos run writes down: what clients asked for and saw, which faults were put in, what the supervisor said.

Filled by the clients and by the campaign, read by the checker and by the report. Holds data only; every time is Unix
time in seconds, taken by one process.
"""

from __future__ import annotations

from enum import Enum

from msgspec import Struct, field


class Delivery(Struct, frozen=True, array_like=True):
    """A piece of one choice, as it reached the client."""

    at: float
    choice: int
    position: int
    """Of the first unit of `content`, counted from 0 within the choice."""
    content: list[int] | str
    """Token ids, or text where the client sees text only; a unit is a token or a character."""


class End(Struct, frozen=True, array_like=True):
    """The word that a choice is complete."""

    at: float
    choice: int
    reason: str


class Request(Struct):
    """One request, from the client's side."""

    name: str
    case: str
    """Key of what the oracle expects."""
    sent_at: float
    accepted_at: float | None = None
    """First word of the server that is no refusal; from here on the request must not be lost."""
    deliveries: list[Delivery] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    completion_tokens: int | None = None
    """The server's own count over all choices, where it was asked for."""
    refused: str | None = None
    """What the server said instead of accepting."""
    error: str | None = None
    """What ended it after it was accepted, or instead of an answer."""
    error_at: float | None = None
    left_at: float | None = None
    """When the client went away on purpose: nothing is owed to it any more."""
    reconnects: int = 0
    """How often the client took its stream up again."""


class Expects(Enum):
    """What has to come of a fault that was put in."""

    WORLD_FAULT = "world fault"
    """The supervisor finds the world (or the spare) at fault and replaces it."""
    NOTHING = "nothing"
    """Nobody may take it for a fault."""
    ANYTHING = "anything"
    """Worlds may be lost because of it, and need not: the machine is short of something."""
    NEW_FRONT = "new front"
    NEW_SUPERVISOR = "new supervisor"


class Injection(Struct):
    """One fault that was put in."""

    number: int
    at: float
    kind: str
    target: str
    expects: Expects
    epoch: int | None = None
    """Of the world that was hit."""
    rank: int | None = None
    until: float | None = None
    """When it was undone, for what can be undone."""
    load_average: float = 0.0
    spare_parked: bool = False
    """Whether a spare stood ready when it came."""


class Detection(Struct, frozen=True):
    """The supervisor's word that something is at fault."""

    at: float
    epoch: int | None
    """None where it is no world."""
    kind: str
    detail: str = ""
    spare: bool = False


class Recovery(Struct, frozen=True):
    """The supervisor's word that a world serves again."""

    at: float
    epoch: int


class Leftover(Struct, frozen=True):
    """Something of a dead world, or of a deployment that has ended, which was still there."""

    at: float
    what: str


class History(Struct):
    """One deployment from its start to its end."""

    spare: str
    requests: list[Request] = field(default_factory=list)
    injections: list[Injection] = field(default_factory=list)
    detections: list[Detection] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    leftovers: list[Leftover] = field(default_factory=list)
    died: str | None = None
    """How `phalanx serve` ended, if nobody had told it to."""


class Expected(Struct, frozen=True):
    """What an undisturbed run brings for one choice of a case."""

    token_ids: list[int]
    margins: list[float]
    """For each token, how far the model was from another one: the difference of the two best logits where the choice
    is greedy, the distance to the nearest border of the token's interval where it is drawn."""
    text: str
    text_ends: list[int]
    """For each token, how many characters of `text` are certain once it is there."""
    finish_reason: str


Oracle = dict[str, list[Expected]]
"""For each case, what each of its choices brings."""
