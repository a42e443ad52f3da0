"""A request that kills every world that runs it fails alone: the streams beside it go on, and so does the server."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.recovery.served import Served
from tests.tiny_models import make_tiny_llama

POISON = 77
"""The token that a rank dies of."""
NUM_TOKENS = 400


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", max_model_len=2048)


@dataclass
class Asked:
    """A completion, in a thread of its own."""

    prompt: list[int]
    stream: bool = True
    tokens: int = 0
    finish_reason: str | None = None
    error: openai.APIError | None = None
    thread: threading.Thread = field(init=False)

    def start(self, served: Served) -> Asked:
        self.thread = threading.Thread(target=self._run, args=(served,), daemon=True)
        self.thread.start()
        return self

    def _run(self, served: Served) -> None:
        api = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=2, timeout=120)
        extra: dict[str, Any] = {"logit_bias": {str(POISON): -100}, "extra_body": {"ignore_eos": True}}
        try:
            if not self.stream:
                api.completions.create(model=served.model, prompt=self.prompt, max_tokens=NUM_TOKENS, **extra)
                return
            for chunk in api.completions.create(
                model=served.model, prompt=self.prompt, max_tokens=NUM_TOKENS, temperature=0, stream=True,
                stream_options={"include_usage": True}, **extra,
            ):  # fmt: skip
                for choice in chunk.choices:
                    self.finish_reason = choice.finish_reason or self.finish_reason
                if chunk.usage is not None:
                    self.tokens = chunk.usage.completion_tokens
        except openai.APIError as error:
            self.error = error


@pytest.mark.parametrize(
    ("fault", "deaths", "stream", "fronts"),
    [
        ("segv rank=1", 4, False, 1),
        pytest.param("kill", 6, True, 1, marks=pytest.mark.slow),
        pytest.param("segv rank=1", 5, False, 2, marks=pytest.mark.slow),
    ],
)
def test_poison_fails_alone(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    deaths: int,
    stream: bool,
    fronts: int,
) -> None:
    monkeypatch.setenv("PHALANX_FAULTS", f"{fault} token={POISON}")
    flags = ("--tp", "2", "--kv-cache-memory", "16MiB", "--fronts", str(fronts))
    with Served(str(tiny_model), tmp_path, *flags) as served:
        innocents = [Asked([5 + number, 6, 7]).start(served) for number in range(3)]
        poison = Asked([8, POISON, 9], stream).start(served)
        poison.thread.join(90)
        assert poison.error is not None and poison.error.code == "poisoned"
        assert poison.error.type == "server_error"
        if not stream:  # a stream may have begun, with comments that keep it alive
            assert isinstance(poison.error, openai.InternalServerError), poison.error
            assert poison.error.response.headers["x-should-retry"] == "false"
        assert "SIG" in poison.error.message and "in step" in poison.error.message
        for innocent in innocents:
            innocent.thread.join(90)
            assert innocent.error is None and innocent.finish_reason == "length", innocent
            assert innocent.tokens == NUM_TOKENS
        cluster = served.cluster()
        # Once only: the SDK does not try again what is poisoned.
        assert deaths - fronts <= len(cluster["faults"]) <= deaths, cluster[
            "faults"
        ]  # fewer if some were acquitted
        assert Asked([5, 6]).start(served).thread.join(60) is None
        assert served.active_world()["epoch"] >= deaths - fronts + 1
