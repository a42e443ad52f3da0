"""What operators and their tools ask: health, metrics, the cluster.

These answer from what the front has in memory; they never wait for a world.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from gateway.metrics import FrontMetrics
from gateway.requests import Requests
from gateway.supervision import Supervision, adoption_wait_s
from gateway.worlds import Worlds


@dataclass(frozen=True)
class Operations:
    """The endpoints beside the models."""

    worlds: Worlds
    requests: Requests
    metrics: FrontMetrics
    supervision: Supervision

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/health", self.health, methods=["GET"])
        router.add_api_route("/health/live", self.live, methods=["GET"])
        router.add_api_route("/health/ready", self.ready, methods=["GET"])
        router.add_api_route("/health/accepting", self.accepting, methods=["GET"])
        router.add_api_route("/metrics", self.show_metrics, methods=["GET"])
        router.add_api_route("/cluster", self.cluster, methods=["GET"])
        return router

    async def health(self) -> Response:
        """As vLLM's: empty, 200 or 503."""
        return Response(status_code=200 if self.requests.serving else 503)

    async def live(self) -> Response:
        """The front runs; nothing more."""
        return _json({"live": True})

    async def ready(self) -> Response:
        """Whether a world serves, and if not, why not."""
        reason = self.why_not_ready()
        if reason is None:
            return _json({"ready": True, "epoch": self.worlds.serving_epoch})
        return _json({"ready": False, "reason": reason}, status=503)

    async def accepting(self) -> Response:
        """Whether new requests are taken on: to be served now, or held until the next world serves. For whoever would
        send them elsewhere, like the readiness probe of a pod."""
        reason = self.why_not_accepting()
        if reason is not None:
            return _json({"accepting": False, "reason": reason}, status=503)
        return _json({"accepting": True, "held": self.worlds.serving_epoch is None})

    def why_not_accepting(self) -> str | None:
        """None as long as a world that was lost has not been away for longer than a request is held."""
        outage_s, held_s = self.worlds.outage_s, self.requests.max_wait_s
        if outage_s is not None and outage_s <= held_s:
            return self._why_not_taken()
        return self.why_not_ready()

    def why_not_ready(self) -> str | None:
        """Why requests are not served now; None if they are."""
        refused = self._why_not_taken()
        return refused if self.requests.draining else self.worlds.why_not_ready() or refused

    def _why_not_taken(self) -> str | None:
        """Why no new request is taken on, whatever the worlds do."""
        journal = self.metrics.journal
        if self.requests.draining:
            return f"the server is shutting down; requests that still run: {self.requests.num_live}"
        if journal is not None and journal.failing is not None:
            return f"the journal cannot be written, new requests are refused: {journal.failing}"
        return None

    async def show_metrics(self) -> Response:
        return Response(self.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    async def cluster(self) -> Response:
        """Every world and every rank, the last faults, and the front itself."""
        return _json(self.describe())

    def describe(self) -> dict[str, Any]:
        """What `/cluster` answers."""
        journal = self.metrics.journal
        front = {
            "pid": os.getpid(),
            "requests_live": self.metrics.live,
            "journal_failing": journal.failing if journal is not None else None,
        }
        gone_s = self.supervision.gone_s
        supervisor = {"gone_s": None if gone_s is None else round(gone_s, 3), "wait_s": adoption_wait_s()}
        return {**self.worlds.describe(), "front": front, "supervisor": supervisor}


def _json(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status_code=status, media_type="application/json")
