"""The front's ZeroMQ endpoint: the same protocol that rank 0 speaks, with text on top.

Runs in the front's loop and hands everything to requests.py. Tokens of one batch for one client travel in one
message.
"""

from __future__ import annotations

import asyncio
import hashlib
import time

import msgspec

from gateway.call_ids import new_call_id
from gateway.calls import Call, Calls, Conditions, KeyReused, OnDisconnect, Wanted
from gateway.curve import ServerKeys
from gateway.errors import GatewayError, RequestFailed
from gateway.flow_control import UnreadTokens, Window, weight
from gateway.grammars import problem_of
from gateway.journal import JournalCall, JournalEntry
from gateway.live_request import Request
from gateway.protocol import PROTOCOL_VERSION, Cancel, Capability, Output, Submit, Tokens, Welcome, encode
from gateway.reading import TextReader, whole_output
from gateway.router import Router
from gateway.sockets import ReadPump
from gateway.text import LONG_TEXT, TextModel

_KEY_SPACE = "zmq:"
CAPABILITIES: tuple[Capability, ...] = ("text", "chat", "stop", "deadline", "resume", "credit", "pooling")
MAX_UNREAD_TOKENS = 1 << 20
"""Of requests that have ended and whose clients let nothing more come, all together: some 40 MB."""


class _ClientRequest:
    """One request of one client; it is the sink of its own outputs, or one of those who listen to its call."""

    __slots__ = (
        "call",
        "client",
        "ended",
        "fingerprint",
        "reader",
        "request",
        "request_id",
        "server",
        "window",
    )

    def __init__(self, server: ZmqServer, client: bytes, request_id: str) -> None:
        self.server = server
        self.client = client
        self.request_id = request_id
        self.request: Request | None = None
        """Of one that ends with its connection."""
        self.call: Call | None = None
        """Of one with a key. Neither is there while the prompt is tokenized."""
        self.fingerprint = b""
        """Of what the client asked for, before anything was made of it."""
        self.reader: TextReader | None = None
        """Of a client that came to a call behind its beginning."""
        self.window: Window | None = None
        """Of a client that says how much it can take."""
        self.ended = False

    @property
    def entry(self) -> JournalEntry | None:
        """What it has brought; None while the prompt is tokenized."""
        if self.request is not None:
            return self.request.entry
        return self.call.record.entries[0] if self.call is not None else None

    def output(self, request: Request, output: Output) -> None:
        self.server.show(self, output)

    def failed(self, request: Request, error: RequestFailed) -> None:
        self.server.fail(self, error)

    def put(self, index: int, output: Output) -> None:
        parts = [(True, output)] if self.reader is None else self.reader.read(output)
        for is_new, shown in parts:
            if is_new and not self.ended:
                self.server.show(self, shown)

    def fail(self, error: RequestFailed) -> None:
        self.server.fail(self, error)


class ZmqServer:
    """A ROUTER for clients. The epoch of its welcome is 0: worlds may change under a client's requests."""

    endpoint: str

    def __init__(
        self, endpoint: str, calls: Calls, text: TextModel, model: str, curve: ServerKeys | None = None
    ) -> None:
        """Binds; to be made in the running loop. Raises EndpointError."""
        self._calls = calls
        self._requests = requests = calls.requests
        self._text = text
        self._model = model
        self._router = Router(endpoint, self._welcome, epoch=0, curve=curve)
        self.endpoint = self._router.endpoint
        self._live: dict[tuple[bytes, str], _ClientRequest] = {}
        self._outputs: dict[bytes, list[Output]] = {}
        self._unread: UnreadTokens[_ClientRequest] = UnreadTokens(MAX_UNREAD_TOKENS)
        self._batch = 0
        self._background: set[asyncio.Task[None]] = set()
        self._pump = ReadPump(self._router.socket, self._drain)
        requests.after_batch.append(self._flush)

    def world_up(self) -> None:
        """Clients that came before the first world are welcomed now."""
        self._router.greet_waiting()
        self._pump.check()

    def check_clients(self) -> None:
        """To be called now and then: silent clients are lost only when somebody looks."""
        self._drain()
        self._pump.check()

    def close(self) -> None:
        for task in self._background:
            task.cancel()
        self._pump.close()
        self._router.close()

    def show(self, live: _ClientRequest, output: Output) -> None:
        """Of an output what the client can take now; it asks for the rest."""
        window, entry = live.window, live.entry
        if window is None or entry is None or output.finish_reason == "cancelled":
            if window is not None:
                output = msgspec.structs.replace(output, position=window.num_sent)
            self.queue_output(live, output)
        elif (shown := window.take(output)) is not None:
            self.queue_output(live, shown)
        else:
            self._show_more(live)

    def _show_more(self, live: _ClientRequest) -> None:
        window, entry = live.window, live.entry
        if window is None or entry is None or live.ended:
            return
        eos = self._requests.welcome.eos_token_ids if self._requests.welcome is not None else ()
        for shown in window.more(entry, self._text, eos):
            self.queue_output(live, shown)
        if entry.ended and not live.ended:
            unread = len(entry.output_token_ids) - window.num_sent
            self._unread.add(live, unread * weight(entry.params))
            for late in self._unread.take_excess():
                text = "its client does not read it, and others need the room; submit it again, with its key"
                self.fail(late, RequestFailed("overloaded", text))

    def queue_output(self, live: _ClientRequest, output: Output) -> None:
        """Keeps an output until the batch is complete."""
        message = msgspec.structs.replace(output, request_id=live.request_id)
        self._outputs.setdefault(live.client, []).append(message)
        if output.finish_reason is not None:
            self._forget(live)

    def fail(self, live: _ClientRequest, error: RequestFailed) -> None:
        """Tells the client that a request ended with an error."""
        if not live.ended:
            self._forget(live)
            self._router.fail(live.client, live.request_id, error.code, error.message, error.retry_after_s)
            self._pump.check()

    def _welcome(self) -> Welcome | None:
        world = self._requests.welcome
        if world is None:
            return None
        return Welcome(
            PROTOCOL_VERSION,
            0,
            self._model,
            world.tp,
            world.pp,
            world.limits,
            world.eos_token_ids,
            [name for name in CAPABILITIES if name != "chat" or self._text.chat_template is not None],
        )

    def _drain(self) -> None:
        for client in self._router.lost_clients():
            for live in [live for key, live in self._live.items() if key[0] == client]:
                self._lose(live)
        for client, message in self._router.drain():
            if isinstance(message, Submit):
                self._submit(client, message)
            elif (running := self._live.get((client, message.request_id))) is None:
                continue
            elif isinstance(message, Cancel):
                self._cancel(running)
            elif running.window is not None:
                running.window.grant(message.tokens)
                self._show_more(running)
                self._flush()

    def _submit(self, client: bytes, message: Submit) -> None:
        live = self._live[client, message.request_id] = _ClientRequest(self, client, message.request_id)
        if message.credit is not None:
            live.window = Window(message.credit, len(message.output_token_ids))
        if _is_kept(message):
            live.fingerprint = _fingerprint(message)
        problem = _problem_of_texts(message)
        if problem is not None:
            self.fail(live, RequestFailed("invalid_request", problem))
        elif self._attach(live, message):
            return
        elif _num_characters(message) > LONG_TEXT or message.params.grammar is not None:
            # What waits for a thread waits, too.
            if len(self._background) >= self._requests.waiting.max_requests:
                text = f"{len(self._background)} requests wait to be read already; try again later"
                self.fail(live, RequestFailed("overloaded", text, retry_after_s=1))
                return
            task = asyncio.ensure_future(self._accept_long(live, message))
            self._background.add(task)
            task.add_done_callback(self._background.discard)
        elif message.prompt is None and not message.messages:
            self._accept(live, message, message.prompt_token_ids)
        else:
            self._encode_and_accept(live, message)

    def _encode_and_accept(self, live: _ClientRequest, message: Submit) -> None:
        try:
            message = self._encode(message)
        except (ValueError, GatewayError) as error:
            self.fail(live, RequestFailed("invalid_request", str(error)))
            return
        self._accept(live, message, message.prompt_token_ids)

    def _encode(self, message: Submit) -> Submit:
        """The same with token ids in place of text. Raises ValueError, ChatTemplateError, ModelFilesError."""
        at_most = self._max_model_len()
        if message.messages:
            conversation = [{"role": one.role, "content": one.content} for one in message.messages]
            token_ids = self._text.encode_chat(conversation, at_most=at_most)
            return msgspec.structs.replace(message, prompt_token_ids=token_ids)
        if message.prompt is None:
            return message
        token_ids = self._text.encode(message.prompt, at_most=at_most)
        params = message.params
        if message.continuation is not None and params.pooling is not None:
            scored = self._text.encode(message.continuation, at_most=at_most, add_special_tokens=False)
            pooling = msgspec.structs.replace(params.pooling, first_scored=len(token_ids))
            params = msgspec.structs.replace(params, pooling=pooling)
            token_ids = token_ids + scored
        return msgspec.structs.replace(message, prompt_token_ids=token_ids, params=params)

    async def _accept_long(self, live: _ClientRequest, message: Submit) -> None:
        """For what takes so long that it is done in a thread."""
        try:
            message = await asyncio.to_thread(self._encode, message)
            if message.params.grammar is not None:
                await asyncio.to_thread(problem_of, message.params.grammar)  # kept, for accept
        except (ValueError, GatewayError) as error:
            self.fail(live, RequestFailed("invalid_request", str(error)))
            return
        if not live.ended:  # not cancelled meanwhile
            self._accept(live, message, message.prompt_token_ids)

    def _max_model_len(self) -> int | None:
        return self._requests.welcome.limits.max_model_len if self._requests.welcome is not None else None

    def _accept(self, live: _ClientRequest, message: Submit, prompt_token_ids: list[int]) -> None:
        try:
            if not _is_kept(message):
                live.request = self._requests.accept(
                    prompt_token_ids,
                    message.params,
                    message.stop,
                    live,
                    message.output_token_ids,
                    message.priority,
                    message.deadline_s,
                )
            elif not self._attach(live, message):  # nobody was faster with the same key
                record = JournalCall(
                    f"zmq-{new_call_id()}",
                    "zmq",
                    time.time(),
                    _KEY_SPACE + message.key,
                    live.fingerprint,
                    OnDisconnect.GRACE,
                )
                wanted = Wanted(prompt_token_ids, message.params, message.output_token_ids)
                conditions = Conditions(message.stop, message.priority, message.deadline_s)
                live.call = self._calls.begin(record, [wanted], conditions)
                live.call.listen(live)
        except RequestFailed as error:
            self.fail(live, error)

    def _attach(self, live: _ClientRequest, message: Submit) -> bool:
        """Brings a client to the request that has its key already; False if there is none."""
        if not _is_kept(message):
            return False
        try:
            call = self._calls.find_key(_KEY_SPACE + message.key, live.fingerprint)
        except KeyReused:
            text = "this key was used for another request; use a new one for each request"
            self.fail(live, RequestFailed("invalid_request", text))
            return True
        except RequestFailed as error:
            self.fail(live, error)
            return True
        if call is None:
            return False
        [entry] = call.record.entries
        known = message.output_token_ids
        common = min(len(known), len(entry.output_token_ids))
        if len(known) < entry.num_given or known[:common] != entry.output_token_ids[:common]:
            text = "output_token_ids are not what the request with this key has brought"
            self.fail(live, RequestFailed("invalid_request", text))
            return True
        eos = self._requests.welcome.eos_token_ids if self._requests.welcome is not None else ()
        stream = self._text.stream(entry.stop, entry.prompt_token_ids, entry.params)
        live.reader = TextReader(entry, stream, eos, len(known))
        live.call = call
        if entry.error is not None:  # it gave up its key, or will in this turn
            self.fail(live, RequestFailed(*entry.error))
            return True
        call.listen(live)
        output = whole_output(entry)
        if output.token_ids or entry.ended:
            live.put(0, output)
            self._flush()
        return True

    def _cancel(self, live: _ClientRequest) -> None:
        if live.request is not None:
            self._requests.cancel(live.request)
        elif live.call is not None:
            live.call.cancel()
        if not live.ended:  # the prompt is being tokenized, or it has ended and was not read to its end
            position = 0 if live.window is None else live.window.num_sent
            self.queue_output(live, Output(live.request_id, position, [], "cancelled", None, ""))
            self._flush()

    def _lose(self, live: _ClientRequest) -> None:
        """Its client is gone."""
        if live.call is None:
            self._cancel(live)
        else:
            self._calls.leave(live.call, live)
            self._forget(live)

    def _forget(self, live: _ClientRequest) -> None:
        live.ended = True
        self._unread.remove(live)
        self._live.pop((live.client, live.request_id), None)
        self._router.finish(live.client, live.request_id)
        live.request = live.call = None  # they know it, too: without the ring nothing waits for a collection

    def _flush(self) -> None:
        if not self._outputs:
            return
        outputs, self._outputs = self._outputs, {}
        self._batch += 1
        epoch = self._requests.welcome.epoch if self._requests.welcome is not None else 0
        for client, client_outputs in outputs.items():
            self._router.send(client, Tokens(epoch, self._batch, client_outputs))
        self._pump.check()


def _problem_of_texts(message: Submit) -> str | None:
    """What is wrong with the texts of a request; None if nothing is."""
    if (message.prompt is not None) + bool(message.prompt_token_ids) + bool(message.messages) > 1:
        return "give one of prompt, prompt_token_ids and messages, not several"
    if message.continuation is not None:
        pooling = message.params.pooling
        if pooling is None or pooling.kind != "score" or message.prompt is None:
            return "continuation is text to score: it goes with prompt and with params.pooling of kind score"
    return None


def _num_characters(message: Submit) -> int:
    """Of text to tokenize."""
    chat = sum(len(one.content) for one in message.messages)
    return len(message.prompt or "") + len(message.continuation or "") + chat


def _is_kept(message: Submit) -> bool:
    """Whether a request outlives its connection. What a pooled one brings is no tokens: it is asked again."""
    return bool(message.key) and message.params.pooling is None


def _fingerprint(message: Submit) -> bytes:
    """Of what is asked for, without what differs when it is asked again."""
    same = msgspec.structs.replace(
        message, request_id="-", epoch=0, output_token_ids=[], deadline_s=None, key="", credit=None
    )
    return hashlib.blake2b(encode(same), digest_size=16).digest()
