"""The messages that clients, the front and rank 0 exchange over ZeroMQ, and their encoding.

The ground floor: everything in `gateway`, rank 0, the front and the supervisor may import this module;
it imports nothing of the project. One message is one ZeroMQ frame of msgpack: a map with a `type` key.
An unknown key is ignored, a wrong type is refused; nothing is ever unpickled. See docs/zeromq.md. What the
supervisor and the front say to each other is in control_messages.py.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct, field

PROTOCOL_VERSION = 1
"""The version that this code speaks. A server serves a client whose range of versions contains it."""

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
"""Bound of one frame; sockets are opened with it as ZMQ_MAXMSGSIZE."""

HEARTBEAT_INTERVAL_S = 2.5
"""How often an idle client pings; three missed answers mean a dead connection (Majordomo protocol, 7/MDP)."""

FinishReason = Literal["stop", "length", "cancelled"]

Capability = Literal["text", "chat", "stop", "deadline", "resume", "credit", "pooling", "stats"]
"""What a server of this version may or may not do, as its `Welcome` says; see docs/zeromq.md."""

TokenId = Annotated[int, Meta(ge=0, lt=2**31)]


class ProtocolError(Exception):
    """A frame that is not a valid message. Its text says what was wrong and may be sent to the peer."""


class Pooling(Struct, frozen=True, omit_defaults=True):
    """Numbers about the prompt instead of tokens after it; the request ends with them. They come as float32."""

    kind: Literal["last", "mean", "score"] = "last"
    """`last`, `mean`: the hidden state of the last token, or the mean over all tokens, after the model's final norm.
    `score`: the log-probability of each token from `first_scored` on, given those before it."""
    normalize: bool = True
    """Of a hidden state: divided by its Euclidean length."""
    first_scored: Annotated[int, Meta(ge=0)] = 0
    """With `score`: index of a token of the prompt, 1 or more."""


class SamplingParams(Struct, frozen=True, omit_defaults=True):
    """How the tokens of one request are chosen, or that none are.

    `seed` and `choice` key the noise together with the token's absolute position in the sequence, so that a
    token depends on its request alone: never on batch mates, on the world, or on a replay.
    """

    max_tokens: Annotated[int, Meta(ge=1)] = 16
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 1.0
    """0 is greedy."""
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=0)] = 0
    """0 keeps every token."""
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    """None asks for a random one. The gateway that takes the request draws it, so that behind a gateway (in
    the front's journal, in the engine, in a replay) there is always a number."""
    choice: Annotated[int, Meta(ge=0, lt=2**16)] = 0
    """Which of the request's `n` choices this is."""
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    """Tokens less likely than this share of the most likely one are not drawn."""
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=100.0)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    logit_bias: dict[int, Annotated[float, Meta(ge=-100.0, le=100.0)]] = field(default_factory=dict)
    """Token id to what is added to its logit."""
    min_tokens: Annotated[int, Meta(ge=0)] = 0
    """Output tokens before which neither end nor stop tokens are drawn."""
    bad_words: Annotated[
        list[Annotated[list[TokenId], Meta(min_length=1, max_length=1024)]], Meta(max_length=256)
    ] = field(default_factory=list)
    """Token sequences that are never completed."""
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    """Alternatives to report with each token; 0 reports the token's own log-probability."""
    prompt_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    """The same for each prompt token but the first; all of them come with the first output token."""
    grammar: Annotated[str, Meta(max_length=1_000_000)] | None = None
    """What the output must match: a grammar as llguidance takes it (Lark, or its JSON form)."""
    ignore_eos: bool = False
    """The end token is sampled and fed back like any other, and ends nothing."""
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=256)] = field(default_factory=list)
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    """No other token is drawn."""
    skip_special_tokens: bool = True
    """Special tokens have no text. This and the next two are for the front, which makes the text."""
    shown_token_ids: Annotated[list[TokenId], Meta(max_length=256)] = field(default_factory=list)
    """Special tokens that have text all the same."""
    include_stop_str_in_output: bool = False
    """The text ends with the stop string that ended it, not before."""
    pooling: Pooling | None = None
    """Asks for numbers about the prompt. Nothing is generated: every other option but `seed` stays as it is here."""

    @property
    def num_new_tokens(self) -> int:
        """How many tokens the request may bring."""
        return 0 if self.pooling is not None else self.max_tokens


# --------------------------------------------------------------------------- client -> server


class Hello(Struct, frozen=True, tag="hello", tag_field="type"):
    """The first message of a connection, and again after every reconnect."""

    min_version: int = PROTOCOL_VERSION
    max_version: int = PROTOCOL_VERSION
    client: str = ""
    capabilities: Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(max_length=64)] = field(
        default_factory=list
    )
    """What the client knows beyond the first edition of the protocol; for servers to come."""


class ChatMessage(Struct, frozen=True):
    """One message of a conversation."""

    role: Annotated[str, Meta(max_length=64)]
    content: str


class Submit(Struct, frozen=True, tag="submit", tag_field="type", omit_defaults=True):
    """One request for one sequence of tokens.

    `output_token_ids` are tokens that were emitted for this request before (in an earlier world): they are
    part of the context, count against `max_tokens`, and are not sent again. Prompt and output are separate
    fields because penalties, minimum lengths and grammars need the border between them.
    """

    request_id: Annotated[str, Meta(min_length=1, max_length=256)]
    epoch: int = 0
    """Epoch of the world that it is meant for, from `Welcome`; 0 is any. A world drops other epochs."""
    prompt_token_ids: list[TokenId] = field(default_factory=list)
    prompt: str | None = None
    """Text instead of token ids; only the front takes it, rank 0 refuses it."""
    output_token_ids: list[TokenId] = field(default_factory=list)
    params: SamplingParams = field(default_factory=SamplingParams)
    messages: Annotated[list[ChatMessage], Meta(max_length=4096)] = field(default_factory=list)
    """A conversation instead of a prompt; only the front takes it, and writes it with the model's chat template."""
    stop: Annotated[list[Annotated[str, Meta(max_length=4096)]], Meta(max_length=16)] = field(
        default_factory=list
    )
    """Stop strings; only the front takes them."""
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] = 0
    """Lower is served first; first come first served within one."""
    continuation: str | None = None
    """Text whose tokens are scored behind `prompt`: sets `first_scored` of a pooling of kind `score`; only the front
    takes it."""
    deadline_s: Annotated[float, Meta(gt=0.0)] | None = None
    """Seconds after which the request ends with the error "timeout", whatever it has brought; only the front
    takes it, and keeps it across worlds."""
    key: Annotated[str, Meta(max_length=255)] = ""
    """A name that no other request has and nobody can guess. The front takes the same request with the same key, on
    whichever connection, for the same: it goes on behind `output_token_ids`. Rank 0 takes no notice of it."""
    credit: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    """How many output tokens may be sent before `Credit` allows more; None: all of them. Only the front takes it."""


class Cancel(Struct, frozen=True, tag="cancel", tag_field="type"):
    """Ends a request; the answer is an output with finish_reason "cancelled", if it was still running."""

    request_id: str
    epoch: int = 0


class Credit(Struct, frozen=True, tag="credit", tag_field="type"):
    """Lets so many more output tokens of a request come that was submitted with `credit`."""

    request_id: str
    tokens: Annotated[int, Meta(ge=1, lt=2**31)]


class Ping(Struct, frozen=True, tag="ping", tag_field="type"):
    sent_at: float = 0.0
    """Any number; it comes back in the answer."""


ClientMessage = Hello | Submit | Cancel | Credit | Ping


# --------------------------------------------------------------------------- server -> client


class Limits(Struct, frozen=True):
    """What a request may ask of this world at most."""

    max_model_len: int
    """Tokens of prompt and output together."""
    kv_cache_tokens: int
    """Tokens that the KV cache of the world holds, over all sequences."""
    max_num_seqs: int
    vocab_size: int
    hidden_size: int = 0
    """Numbers of a pooled hidden state; 0: not known."""


class Welcome(Struct, frozen=True, tag="welcome", tag_field="type"):
    """The answer to `Hello`."""

    version: int
    epoch: int
    model: str
    tp: int
    pp: int
    limits: Limits
    eos_token_ids: list[int]
    capabilities: list[str] = field(default_factory=list)
    """What this server can do, see Capability; a client passes over those that it does not know."""


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, of the model's own distribution: before penalties and temperature."""

    token_id: int
    logprob: float
    rank: int
    """1 is the most likely token."""
    top_token_ids: list[int]
    top_logprobs: list[float]


class Output(Struct, frozen=True, array_like=True):
    """New tokens of one request. Encoded as an array; later versions may add elements at its end."""

    request_id: str
    position: int
    """Index of `token_ids[0]` among the output tokens of the request, counted from 0 over all worlds."""
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token id or the stop string that ended it; None for an end token and for other ends."""
    text: str | None = None
    """New text, from the front only; characters that are not complete yet are held back."""
    logprobs: list[TokenLogprobs] | None = None
    """One entry for each of `token_ids`, when asked for."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Of the prompt's tokens from the second on; with the first output token, when asked for."""
    pooled: bytes | None = None
    """Float32 numbers, little-endian, in the only output of a request with `pooling`."""
    num_cached_tokens: int | None = None
    """How many of the prompt's tokens were in the prefix cache; with the first output token, where it is known."""


class Tokens(Struct, frozen=True, tag="tokens", tag_field="type"):
    """All that one step brought for one client: the tokens of a step travel in one message."""

    epoch: int
    step: int
    outputs: list[Output]


ErrorCode = Literal[
    "bad_message",  # not a valid message, or a version that is not spoken
    "not_connected",  # the server does not know this connection (any more): hello first, then submit again
    "invalid_request",  # the request asks for something that is not allowed; retrying is useless
    "timeout",  # the request's own deadline has passed; it was cancelled
    "overloaded",  # too many requests are waiting; retry later
    "unavailable",  # no world is there to serve it, and the wait limit has passed
    "internal",  # the server's fault
    "poisoned",  # each world that ran the request died, the last one with nothing else in it; do not send it again
]


class Failed(Struct, frozen=True, tag="failed", tag_field="type"):
    """A request that ends without having finished, or (with no request id) a message that was refused."""

    epoch: int
    request_id: str | None
    code: ErrorCode
    message: str
    retry_after_s: float | None = None
    """With `overloaded`: seconds after which it is worth a new try."""


class Pong(Struct, frozen=True, tag="pong", tag_field="type"):
    sent_at: float
    epoch: int


class Stats(Struct, frozen=True, tag="stats", tag_field="type"):
    """State of the engine; rank 0 sends it to each client that said hello, at most every 0.5 s and when it
    has changed since the last one."""

    epoch: int
    step: int
    num_running: int
    num_waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    num_preemptions: int
    prompt_tokens: int
    """Prompt tokens computed since the world started."""
    generation_tokens: int
    """Tokens sampled since the world started."""
    prefix_cache_queries: int = 0
    """Prompt tokens looked up in the prefix cache since the world started, and those found there."""
    prefix_cache_hits: int = 0


ServerMessage = Welcome | Tokens | Failed | Pong | Stats


# --------------------------------------------------------------------------- encoding

_T = TypeVar("_T")

_encoder = msgspec.msgpack.Encoder()
_client_decoder = msgspec.msgpack.Decoder(ClientMessage)
_server_decoder = msgspec.msgpack.Decoder(ServerMessage)


def encode(message: ClientMessage | ServerMessage) -> bytes:
    """The frame of a message."""
    return _encoder.encode(message)


def decode_client_message(frame: bytes) -> ClientMessage:
    """What a client sent. Raises ProtocolError."""
    return decode_frame(_client_decoder, frame)


def decode_server_message(frame: bytes) -> ServerMessage:
    """What a server sent. Raises ProtocolError."""
    return decode_frame(_server_decoder, frame)


def decode_frame(decoder: msgspec.msgpack.Decoder[_T], frame: bytes) -> _T:
    """The message of one frame, whichever kind the decoder knows. Raises ProtocolError."""
    if len(frame) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message of {len(frame)} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a valid message: {error}") from None
