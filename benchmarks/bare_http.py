"""The peer of benchmarks.front: one route of FastAPI that reads a body and answers a fixed one, and nothing else.

`python -m benchmarks.bare_http FD BYTES` serves on the listening socket FD, with loop and parser of the front.
"""

from __future__ import annotations

import socket
import sys

import uvicorn
from fastapi import FastAPI, Request, Response


def main(descriptor: int, answer: bytes) -> None:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        await request.body()
        return Response(answer, media_type="application/json")

    config = uvicorn.Config(
        app, loop="uvloop", http="httptools", ws="none", lifespan="off", log_config=None, access_log=False
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=descriptor)])


if __name__ == "__main__":
    main(int(sys.argv[1]), b"x" * int(sys.argv[2]))
