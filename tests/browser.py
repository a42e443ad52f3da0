"""A headless Chromium for tests, spoken to through the DevTools protocol: pages, keys, screenshots, and what a script
in the page answers. Uses the Chromium that the machine has (CHROMIUM names another one) and downloads nothing."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.sync.client import ClientConnection, connect

_KEYS = {
    "Enter": (13, "\r"),
    "Tab": (9, ""),
    "Escape": (27, ""),
    "ArrowRight": (39, ""),
    "ArrowDown": (40, ""),
    " ": (32, " "),
}


def find_chromium() -> str | None:
    """The browser to start; None if the machine has none."""
    names = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


class Browser:
    """One browser with one tab. Leave the context to end it."""

    def __init__(self, folder: Path, width: int = 1360, height: int = 900) -> None:
        chromium = find_chromium()
        assert chromium is not None
        profile = folder / "profile"
        self._log = (folder / "chromium.log").open("ab")
        self._process = subprocess.Popen(
            [
                *(chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
                *("--disable-extensions", "--hide-scrollbars", "--remote-debugging-port=0"),
                *(f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"),
            ],
            stdout=self._log,
            stderr=self._log,
        )
        self.console: list[str] = []
        """What the page logged, its errors and what its security policy refused."""
        self._number = 0
        self._connections = contextlib.ExitStack()
        self._socket = self._connect(profile / "DevToolsActivePort")
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def _connect(self, port_file: Path) -> ClientConnection:
        deadline = time.monotonic() + 60
        while not port_file.exists() or len(port_file.read_text().splitlines()) < 2:
            assert time.monotonic() < deadline and self._process.poll() is None, "Chromium did not start"
            time.sleep(0.05)
        port, path = port_file.read_text().splitlines()
        with connect(f"ws://127.0.0.1:{port}{path}", max_size=None, compression=None) as browser:
            browser.send(json.dumps({"id": 1, "method": "Target.getTargets"}))
            targets = json.loads(browser.recv())["result"]["targetInfos"]
        [page] = [target["targetId"] for target in targets if target["type"] == "page"]
        address = f"ws://127.0.0.1:{port}/devtools/page/{page}"
        return self._connections.enter_context(connect(address, max_size=None, compression=None))

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connections.close()
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def call(self, method: str, **params: Any) -> Any:
        """One command of the protocol, and its result."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.console.append(details.get("exception", {}).get("description") or details["text"])
        elif message.get("method") == "Log.entryAdded":
            self.console.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def before_pages(self, script: str) -> None:
        """Runs a script in every page that is opened from now on, before its own."""
        self.call("Page.addScriptToEvaluateOnNewDocument", source=script)

    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are awaited."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str, timeout_s: float = 60.0) -> Any:
        """The value of the expression as soon as it is true."""
        deadline = time.monotonic() + timeout_s
        while not (value := self.run(script)):
            if time.monotonic() > deadline:
                seen = self.run("document.body.innerText")
                raise AssertionError(f"never true: {script}\n{self.console}\n{seen}")
            time.sleep(0.02)
        return value

    def size(self, width: int, height: int, phone: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )

    def prefer(self, **features: str) -> None:
        """What the user prefers: `colour_scheme` and `reduced_motion`."""
        names = {"colour_scheme": "prefers-color-scheme", "reduced_motion": "prefers-reduced-motion"}
        given = [{"name": names[name], "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=given)

    def press(self, *keys: str) -> None:
        """Named keys, one after the other."""
        for key in keys:
            code, text = _KEYS[key]
            common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
            self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Text, to what has the focus."""
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))
