"""The page where an API key is wanted: it asks for one, sends it with everything, and keeps it in the tab alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.key_file import make_key, save
from tests.browser import Browser, find_chromium
from tests.echo_world import EchoCluster

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium here: apt-get install chromium, or name one in CHROMIUM"
)

# What a server with keys answers to a call without a good one; whatever has the key reaches the front.
GATE = """
const front = window.fetch;
window.fetch = (address, options = {}) => new Headers(options.headers).get("authorization") === "Bearer sesame"
  ? front(address, options)
  : Promise.resolve(new Response('{"error": {"message": "no good API key"}}', {status: 401}));
"""


def test_a_server_with_keys(tmp_path: Path) -> None:
    key, record = make_key("alice")
    (tmp_path / "front").mkdir()
    save(tmp_path / "keys.json", [record])
    options = ("--api-key-file", str(tmp_path / "keys.json"))
    with (
        EchoCluster(tmp_path / "front", front_options=options) as cluster,
        Browser(tmp_path) as browser,
    ):
        cluster.start_world()
        cluster.wait_serving(1)
        browser.open(cluster.url)
        browser.wait("!document.getElementById('key-bar').hidden")
        browser.run("document.getElementById('key').focus()")
        browser.type(key)
        browser.press("Enter")
        browser.wait("document.querySelectorAll('#world .rank').length === 1")
        browser.run("document.getElementById('question').focus()")
        browser.type("hello")
        browser.press("Enter")
        browser.wait("document.querySelector('.turn.it .foot')?.textContent.includes('token') === true")
        assert "hello" in browser.run("document.querySelector('.turn.it .words').textContent")


def test_the_key_is_asked_for_and_kept_in_the_tab(tmp_path: Path) -> None:
    (tmp_path / "front").mkdir()
    with EchoCluster(tmp_path / "front") as cluster, Browser(tmp_path) as browser:
        cluster.start_world()
        cluster.wait_serving(1)
        browser.before_pages(GATE)
        browser.open(cluster.url)
        browser.wait("!document.getElementById('key-bar').hidden")
        assert browser.run("document.querySelectorAll('#world .rank').length") == 0
        browser.run("document.getElementById('key').focus()")
        browser.type("wrong")
        browser.press("Enter")
        browser.wait("!document.getElementById('key-bar').hidden")  # it is asked for again
        browser.run("document.getElementById('key').focus()")
        browser.type("sesame")
        browser.press("Enter")
        browser.wait("document.querySelectorAll('#world .rank').length === 1")
        assert browser.run("document.getElementById('key-bar').hidden") is True
        assert browser.run("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        browser.run("document.getElementById('question').focus()")
        browser.type("hello")
        browser.press("Enter")
        browser.wait("document.querySelector('.turn.it .foot')?.textContent.includes('token') === true")
        assert "hello" in browser.run("document.querySelector('.turn.it .words').textContent")
        browser.open(cluster.url + "/?again")
        browser.wait("document.querySelectorAll('#world .rank').length === 1")
