"""All models of the Open Inference Protocol V2 that this server has: which are loaded, what they count, and the way
of a request to one of them.

The HTTP and the gRPC server ask here; neither knows more of a model than its name.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from typing import Any

from gateway.http.errors import ApiError
from gateway.inference.models import VERSION, InferRequest, Model, Part, check_outputs
from gateway.inference.tensors import Tensor

EXTENSIONS = [
    "binary_tensor_data",
    "model_repository",
    "statistics",
    "parameters",
    "generate",
    "model_configuration",
]


@dataclass
class Statistics:
    """What one model has done since the front began."""

    last_inference_ms: int = 0
    """Unix time of the last request, in milliseconds."""
    counts: dict[str, int] = field(default_factory=lambda: {"success": 0, "fail": 0})
    times_ns: dict[str, int] = field(default_factory=lambda: {"success": 0, "fail": 0})
    num_inferences: int = 0

    def note(self, outcome: str, began_ns: int, num_inferences: int) -> None:
        self.counts[outcome] += 1
        self.times_ns[outcome] += time.monotonic_ns() - began_ns
        self.num_inferences += num_inferences
        self.last_inference_ms = int(time.time() * 1000)

    def shown(self, name: str) -> dict[str, Any]:
        """As the statistics extension has it. What is not measured apart is 0; computing is the whole time."""
        success = {"count": self.counts["success"], "ns": self.times_ns["success"]}
        nothing = {"count": self.counts["success"], "ns": 0}
        return {
            "name": name,
            "version": VERSION,
            "last_inference": self.last_inference_ms,
            "inference_count": self.num_inferences,
            "execution_count": self.counts["success"],
            "inference_stats": {
                "success": success,
                "fail": {"count": self.counts["fail"], "ns": self.times_ns["fail"]},
                "queue": nothing,
                "compute_input": nothing,
                "compute_infer": success,
                "compute_output": nothing,
                "cache_hit": {"count": 0, "ns": 0},
                "cache_miss": {"count": 0, "ns": 0},
            },
            "batch_stats": [],
        }


class Repository:
    """The models by name. The first is the one that is served; it cannot be unloaded."""

    def __init__(self, models: Sequence[Model], why_not_ready: Callable[[], str | None]) -> None:
        self._models: dict[str, Model] = {}
        for model in models:
            self._models.setdefault(model.spec.name, model)
        self._served = models[0].spec.name
        self._unloaded: set[str] = set()
        self._statistics = {name: Statistics() for name in self._models}
        self._why_not_ready = why_not_ready

    @property
    def is_ready(self) -> bool:
        """Whether the server takes requests for its language model."""
        return self._why_not_ready() is None

    @property
    def names(self) -> list[str]:
        """Of the models that are loaded."""
        return [name for name in self._models if name not in self._unloaded]

    def find(self, name: str, version: str = "") -> Model:
        """A model that is loaded. Raises ApiError."""
        model = self._models.get(name)
        if model is None or name in self._unloaded:
            text = f"Request for unknown model: '{name[:128]}' is not found"
            raise ApiError(404, f"{text}; this server has {', '.join(self.names)}")
        if version and not (version.isascii() and version.isdecimal()):
            text = f"failed to get model version from specified version string '{version[:40]}'"
            raise ApiError(400, f"{text}; a version is a number, '{name}' has version {VERSION}")
        if version not in ("", VERSION):
            text = f"Request for unknown model: '{name}' version {version[:20]} is not found"
            raise ApiError(404, f"{text}; it has version {VERSION}")
        return model

    def is_model_ready(self, name: str, version: str = "") -> bool:
        """Raises ApiError for a model that is unknown."""
        if name in self._unloaded:
            return False
        return self.find(name, version).why_not_ready() is None

    async def infer(self, name: str, version: str, request: InferRequest) -> list[Tensor]:
        """The outputs of a model. Raises ApiError."""
        model = self.find(name, version)
        with self._counted(name, request):
            check_outputs(model.spec, request)
            return await model.infer(request)

    async def stream(
        self, name: str, version: str, request: InferRequest
    ) -> AsyncGenerator[Part | None, None]:
        """The responses of a model, see Model.stream. To be closed. Raises ApiError."""
        model = self.find(name, version)
        with self._counted(name, request):
            check_outputs(model.spec, request)
            async with contextlib.aclosing(model.stream(request)) as parts:
                async for part in parts:
                    yield part

    def index(self, *, only_ready: bool = False) -> list[dict[str, str]]:
        """Every model, with its state."""
        rows = []
        for name, model in self._models.items():
            reason = "unloaded" if name in self._unloaded else model.why_not_ready()
            if reason is None:
                rows.append({"name": name, "version": VERSION, "state": "READY", "reason": ""})
            elif not only_ready:
                rows.append({"name": name, "version": VERSION, "state": "UNAVAILABLE", "reason": reason})
        return rows

    def load(self, name: str, *, with_parameters: bool = False) -> None:
        """Loads a model of this server again. Raises ApiError."""
        if name not in self._models:
            text = f"failed to load '{name[:128]}': this server has {', '.join(self._models)}"
            raise ApiError(400, f"{text}; `phalanx reload` changes the served model")
        if with_parameters:
            text = f"failed to load '{name}': a configuration or files cannot be given with a load"
            raise ApiError(400, f"{text}; `phalanx reload` changes the served model")
        self._unloaded.discard(name)

    def unload(self, name: str) -> None:
        """Raises ApiError."""
        if name not in self._models:
            raise ApiError(400, f"failed to unload '{name[:128]}': this server has {', '.join(self._models)}")
        if name == self._served:
            text = f"failed to unload '{name}': it is the model that this server is there for"
            raise ApiError(400, f"{text}; `phalanx reload` changes it, `phalanx stop` ends the server")
        self._unloaded.add(name)

    def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """Of one model, or of all. Raises ApiError."""
        if name:
            self.find(name, version)
        names = [name] if name else self.names
        return {"model_stats": [self._statistics[each].shown(each) for each in names]}

    @contextlib.contextmanager
    def _counted(self, name: str, request: InferRequest) -> Iterator[None]:
        statistics, began_ns = self._statistics[name], time.monotonic_ns()
        try:
            yield
        except BaseException:  # a client that leaves counts as failed, too
            statistics.note("fail", began_ns, 0)
            raise
        batch = request.inputs[0].shape[0] if request.inputs and request.inputs[0].shape else 1
        statistics.note("success", began_ns, batch)


@lru_cache(maxsize=1)
def server_metadata() -> dict[str, Any]:
    """What `GET /v2` answers."""
    try:
        version = metadata.version("phalanx-serve")
    except metadata.PackageNotFoundError:  # run from a folder
        version = "unknown"
    return {"name": "phalanx", "version": version, "extensions": EXTENSIONS}
