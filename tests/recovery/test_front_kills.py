"""A front over echo worlds is killed again and again, at any moment: whatever it has answered for is found again by
the next one, and brings every token once. Meanwhile its tokenizer's file is written anew, as other processes do."""

from __future__ import annotations

import http.client
import json
import random
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.echo_world import EchoCluster

PROMPT = "abcdefgh"
NUM_CLIENTS = 8
NUM_KILLS = 12


@dataclass
class Client:
    """Asks without pause over HTTP, and takes up again what breaks."""

    cluster: EchoCluster
    dice: random.Random
    stopping: threading.Event
    finished: int = 0
    taken_up: int = 0
    wrong: list[str] = field(default_factory=list)

    def run(self) -> None:
        number = 0
        while not self.stopping.is_set() and not self.wrong:
            number += 1
            body = {"prompt": PROMPT, "max_tokens": self.dice.choice([3, 20, 60, 200]), "ignore_eos": True}
            body |= {"stream": True, "n": self.dice.choice([1, 1, 2])}
            self.follow(f"{id(self)}-{number}", body)

    def follow(self, key: str, body: dict[str, Any]) -> None:
        """One request to its end."""
        request_id, last, texts = "", "", [""] * body["n"]
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self.cluster.port, timeout=60)
            try:
                if not request_id:
                    content = json.dumps(body)
                    connection.request("POST", "/v1/completions", content, {"idempotency-key": key})
                else:
                    headers = {"last-event-id": last} if last else {}
                    connection.request("GET", f"/v1/requests/{request_id}/stream", headers=headers)
                answer = connection.getresponse()
                if answer.status != 200:
                    self.wrong.append(f"{answer.status} for {request_id!r}: {answer.read().decode()}")
                    return
                self.taken_up += bool(request_id)
                request_id = answer.headers["x-phalanx-request-id"]
                event_id = ""
                while line := answer.readline().decode().rstrip("\n"):
                    while line:
                        if line.startswith("id: "):
                            event_id = line[4:]
                        elif line == "data: [DONE]":
                            self.check(body, texts)
                            return
                        elif line.startswith("data: "):
                            last = event_id
                            for choice in json.loads(line[6:])["choices"]:
                                texts[choice["index"]] += choice["text"]
                        line = answer.readline().decode().rstrip("\n")
            except (OSError, http.client.HTTPException):
                time.sleep(0.02)
            finally:
                connection.close()

    def check(self, body: dict[str, Any], texts: list[str]) -> None:
        count = body["max_tokens"]
        expected = [(PROMPT * 100)[index : index + count] for index in range(body["n"])]
        if texts != expected:
            self.wrong.append(f"{texts} for {body}")
        self.finished += 1


@pytest.mark.slow
def test_nothing_that_was_answered_for_is_lost(tmp_path: Path) -> None:
    dice = random.Random(5)
    stopping = threading.Event()
    with EchoCluster(tmp_path, step_s=0.01, max_wait_s=60) as cluster:
        cluster.wait_serving(cluster.start_world())
        tokenizer = cluster.model_dir / "tokenizer.json"
        content = json.loads(tokenizer.read_bytes())
        clients = [Client(cluster, random.Random(number), stopping) for number in range(NUM_CLIENTS)]
        threads = [threading.Thread(target=client.run) for client in clients]
        for thread in threads:
            thread.start()
        for number in range(NUM_KILLS):
            time.sleep(dice.uniform(0.01, 0.8))
            if dice.random() < 0.3:
                cluster.front.send_signal(signal.SIGSTOP)
                time.sleep(dice.uniform(0, 0.1))
            cluster.restart_front()
            if dice.random() < 0.8:  # else it is killed while it starts
                cluster.wait(lambda: bool(cluster.states) and cluster.states[-1].serving_epoch is not None)
            if number % 5 == 4:
                tokenizer.write_text(json.dumps(content, indent=number))
        stopping.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert [wrong for client in clients for wrong in client.wrong] == []
        assert "moved aside" not in cluster.front_log.read_text()
        assert sum(client.finished for client in clients) > NUM_CLIENTS
        assert sum(client.taken_up for client in clients) > NUM_KILLS
