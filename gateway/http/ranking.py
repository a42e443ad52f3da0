"""/score and /rerank as vLLM answers them for an embedding model: cosines of the served model's embeddings.

The texts become requests with mean pooling, as those of embeddings.py, and survive the death of a world like them.
"""

from __future__ import annotations

import struct
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import Struct

from gateway.http.embeddings import MAX_INPUTS, Embeddings
from gateway.http.errors import ApiError
from gateway.http.openai import read_body
from gateway.http.schema import check, check_model, decode_body
from gateway.http.streams import ClientGone

Texts = str | list[str]


class RankingRequest(Struct, kw_only=True):
    """What both endpoints take."""

    model: str | None = None
    user: str | None = None
    priority: int | None = None
    timeout: float | None = None
    truncate_prompt_tokens: int | None = None


class ScoreRequest(RankingRequest, kw_only=True):
    """vLLM's fields, in the older and the newer names of the two sides."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None


class RerankRequest(RankingRequest, kw_only=True):
    """Fields of Jina's and Cohere's APIs."""

    query: str
    documents: list[str | dict[str, str]]
    top_n: int | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: int | None = None


class Score(Struct, kw_only=True):
    index: int
    object: str = "score"
    score: float


class RankedDocument(Struct):
    text: str


class Ranked(Struct, kw_only=True, omit_defaults=True):
    index: int
    document: RankedDocument | None = None
    relevance_score: float


@dataclass(frozen=True)
class Ranking:
    """The endpoints, over the embeddings of the served model."""

    embeddings: Embeddings

    def router(self) -> APIRouter:
        router = APIRouter()
        for path in ("/score", "/v1/score"):
            router.add_api_route(path, self.score, methods=["POST"])
        for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
            router.add_api_route(path, self.rerank, methods=["POST"])
        return router

    async def score(self, http: Request) -> Response:
        """POST /score: one text against many, or many in pairs."""
        request = decode_body(await read_body(http, self.embeddings.openai.max_body_bytes), ScoreRequest)
        left = _texts(request.text_1, request.queries, "text_1", "queries")
        right = _texts(request.text_2, request.documents, "text_2", "documents")
        if len(left) not in (1, len(right)):
            text = f"text_1 has {len(left)} texts and text_2 {len(right)}; allowed: one and many, or as many of both"
            raise ApiError(400, text, param="text_1", code="invalid_value")
        try:
            vectors, tokens = await self._vectors(http, request, [*left, *right], "text_1")
        except ClientGone:
            return Response(status_code=499)  # nobody reads it
        firsts = vectors[: len(left)] * (len(right) if len(left) == 1 else 1)
        scores = [_cosine(*pair) for pair in zip(firsts, vectors[len(left) :], strict=True)]
        answer = {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": self.embeddings.openai.model,
            "data": [Score(index=index, score=score) for index, score in enumerate(scores)],
            "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
        }
        return Response(msgspec.json.encode(answer), media_type="application/json")

    async def rerank(self, http: Request) -> Response:
        """POST /rerank: documents by their likeness to a query, the likest first."""
        request = decode_body(await read_body(http, self.embeddings.openai.max_body_bytes), RerankRequest)
        documents = [_document(document, index) for index, document in enumerate(request.documents)]
        if not documents:
            raise ApiError(400, "documents is empty", param="documents")
        top_n = request.top_n
        check(top_n is None or top_n >= 0, "top_n", top_n, "0 (for all) and more")
        if request.max_tokens_per_doc is not None:
            raise _unsupported("max_tokens_per_doc")
        try:
            vectors, tokens = await self._vectors(http, request, [request.query, *documents], "documents")
        except ClientGone:
            return Response(status_code=499)
        query = vectors[0]
        shows = request.return_documents is not False
        results = [
            Ranked(
                index=index,
                document=RankedDocument(documents[index]) if shows else None,
                relevance_score=_cosine(query, vector),
            )
            for index, vector in enumerate(vectors[1:])
        ]
        results.sort(key=lambda ranked: ranked.relevance_score, reverse=True)
        answer = {
            "id": f"rerank-{uuid.uuid4().hex}",
            "model": self.embeddings.openai.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "results": results[: top_n or None],
        }
        return Response(msgspec.json.encode(answer), media_type="application/json")

    async def _vectors(
        self, http: Request, request: RankingRequest, texts: Sequence[str], param: str
    ) -> tuple[list[tuple[float, ...]], int]:
        """The embeddings of texts, of length 1, and how many tokens they had. Raises ApiError, ClientGone."""
        check_model(request.model, self.embeddings.openai.model)
        if request.truncate_prompt_tokens is not None:
            raise _unsupported("truncate_prompt_tokens")
        check(len(texts) <= MAX_INPUTS, param, f"{len(texts)} texts", f"up to {MAX_INPUTS}")
        found, tokens = await self.embeddings.compute(
            texts, "mean", param, request.priority, request.timeout, http.receive
        )
        return [struct.unpack(f"<{len(numbers) // 4}f", numbers) for numbers in found], tokens


def _texts(older: Texts | None, newer: Texts | None, name: str, newer_name: str) -> list[str]:
    if (older is None) == (newer is None):
        raise ApiError(400, f"give {name} (or {newer_name}, the same thing), one of them", param=name)
    given = older if newer is None else newer
    assert given is not None
    texts = [given] if isinstance(given, str) else given
    if not texts:
        raise ApiError(400, f"{name} is empty", param=name)
    return texts


def _document(document: str | dict[str, str], index: int) -> str:
    text = document if isinstance(document, str) else document.get("text")
    if text is None:
        place = f"documents[{index}]"
        raise ApiError(400, f"{place} has no text; give a string or an object with `text`", param=place)
    return text


def _unsupported(name: str) -> ApiError:
    text = f"{name} is not supported by this server; shorten the texts before they are sent"
    return ApiError(400, text, param=name, code="unsupported_parameter")


def _cosine(left: tuple[float, ...], right: tuple[float, ...]) -> float:
    """Of vectors that have length 1."""
    return sum(a * b for a, b in zip(left, right, strict=True))
