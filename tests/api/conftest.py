"""One server for all API tests: `phalanx serve` with SmolLM2 over two ranks, on free ports."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.recovery.served import Served

MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    # float32: so that the same request gives the same tokens, whatever runs beside it.
    flags = ("--tp", "2", "--dtype", "float32", "--max-model-len", "2048")
    with Served(MODEL, tmp_path_factory.mktemp("run"), *flags) as served:
        yield served


@pytest.fixture(scope="session")
def api(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="session")
def zmq_endpoint(served: Served) -> str:
    """Where ZeroMQ clients connect, out of the ready line."""
    words = served.ready_line.split()
    return words[words.index("zmq") + 1]
