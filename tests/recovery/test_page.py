"""The page at `/` in a headless Chromium: it shows a rank die while the answer in its chat goes on to its end, and
outlives its front; it is used by keys alone, on a phone, in light and dark."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import httpx
import pytest

from tests.browser import Browser, find_chromium
from tests.recovery.served import Served
from tests.tiny_models import make_tiny_llama

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium here: apt-get install chromium, or name one in CHROMIUM"
)
WORDS = "document.querySelector('.turn.it:last-of-type .words').textContent"
STATUS = "document.getElementById('status').textContent"
MOST_TOKENS = 1000
STEP_S = "0.008"
"""At least, for a step: the browser sees an answer while it is made, on a busy machine too."""

# The lowest contrast of any text that is shown, with the text: relative luminance as WCAG 2.2 defines it. Colours
# are read back from a canvas, since computed ones may be in any notation.
LOWEST_CONTRAST = """(() => {
  const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1});
  const context = canvas.getContext('2d', {willReadFrequently: true});
  const channels = (colour) => { context.clearRect(0, 0, 1, 1); context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1); return [...context.getImageData(0, 0, 1, 1).data]; };
  const luminance = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => { for (; node; node = node.parentElement) {
    const colour = channels(getComputedStyle(node).backgroundColor); if (colour[3] === 255) return colour; } };
  let lowest = [99, ''], checked = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode, parent = text.parentElement;
    if (!text.data.trim() || parent.closest('svg, script, .unseen, .skip') || !parent.checkVisibility()) continue;
    const [a, b] = [luminance(channels(getComputedStyle(parent).color)), luminance(behind(parent))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    checked += 1;
    if (ratio < lowest[0]) lowest = [ratio, text.data.trim().slice(0, 40)];
  }
  return [...lowest, checked];
})()"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", max_model_len=4096)
    flags = ("--tp", "2", "--dtype", "float32", "--deterministic", "--kv-cache-memory", "16MiB")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PHALANX_FAULTS", f"sleep={STEP_S}")
        with Served(str(model), tmp_path_factory.mktemp("run"), *flags) as deployment:
            yield deployment


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, served: Served) -> Browser:
    """The page, freshly loaded on a desktop, with every rank shown."""
    browser.size(1360, 900)
    browser.prefer(colour_scheme="light", reduced_motion="reduce")
    browser.console.clear()
    served.active_world()
    browser.open(served.url)
    browser.wait(f"{STATUS} === 'serving' && document.querySelectorAll('#world .rank').length === 2")
    return browser


def ask(page: Browser, question: str, most_tokens: int = MOST_TOKENS) -> None:
    """Types it, and sends it with Enter; the answer is the likeliest one."""
    page.run(
        f"document.getElementById('temperature').value = '0';"
        f"document.getElementById('most').value = '{most_tokens}';"
        f"document.getElementById('question').focus()"
    )
    page.type(question)
    page.press("Enter")


def undisturbed(served: Served, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    body = {"model": served.model, "messages": messages, "temperature": 0, "max_tokens": MOST_TOKENS}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=120).raise_for_status().json()
    return str(answer["choices"][0]["message"]["content"])


def wait_for_answer(page: Browser) -> str:
    page.wait("!document.querySelector('.turn.it:last-of-type').classList.contains('writing')", 120)
    return str(page.run(WORDS))


def test_every_rank_is_shown(page: Browser, served: Served) -> None:
    page.wait("document.querySelector('#behind [data-kind=spare]') !== null")
    labels = page.run("[...document.querySelectorAll('#world .rank')].map((node) => node.ariaLabel)")
    assert [label.split(":")[0] for label in labels] == [
        "Rank 0, stage 0, tensor-parallel 0",
        "Rank 1, stage 0, tensor-parallel 1",
    ]
    page.wait(
        "[...document.querySelectorAll('#world .memory')].every((node) => / [MG]B$/.test(node.textContent))"
    )
    assert page.run("document.getElementById('model').textContent") == served.model
    assert page.console == []


def test_a_rank_dies_and_the_answer_goes_on(page: Browser, served: Served) -> None:
    expected = undisturbed(served, "hello hello hello")
    world = served.active_world()
    ask(page, "hello hello hello")
    page.wait("document.querySelector('.turn.it .words')?.textContent.length > 20")
    os.kill(world["ranks"][1]["pid"], signal.SIGKILL)
    page.wait("document.querySelector('[data-state=fallen]') !== null")
    fallen = page.run("document.querySelector('[data-state=fallen]').dataset.rank")
    assert fallen == "1"
    assert wait_for_answer(page) == expected and expected
    assert f"{MOST_TOKENS:,} tokens" in page.run("document.querySelector('.turn.it .foot').textContent")
    assert "took over" in page.wait("document.querySelector('.seam[data-mended]')?.dataset.note")
    assert "rank 1" in page.run("document.getElementById('alert').textContent") or expected in page.run(
        "document.getElementById('alert').textContent"
    )
    page.wait("document.querySelector('#faults li[data-mended]') !== null")
    page.wait("document.querySelector('#plot .fault') !== null")
    page.run("document.querySelector('#faults button').click()")
    post_mortem = page.wait("document.querySelector('#faults .post')?.innerText")
    assert "SIGKILL" in post_mortem and str(world["ranks"][1]["pid"]) in post_mortem
    assert page.console == []


def test_the_front_is_killed_and_the_page_comes_back(page: Browser, served: Served) -> None:
    expected = undisturbed(served, "once upon a time")
    ask(page, "once upon a time")
    page.wait("document.querySelector('.turn.it .words')?.textContent.length > 20")
    served.front().kill()
    page.wait(f"{STATUS}.includes('front is away')")
    assert wait_for_answer(page) == expected and expected
    page.wait(f"{STATUS} === 'serving'")


def test_by_keys_alone(page: Browser, served: Served) -> None:
    focus = "document.activeElement.id || document.activeElement.className || document.activeElement.tagName"
    seen = []
    for _ in range(14):
        page.press("Tab")
        seen.append(page.run(focus))
        outline = page.run("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or seen[-1] in ("skip", "BODY"), seen[-1]
        if seen[-1] == "rank":
            page.press("ArrowRight", "Enter")
            assert page.run("document.activeElement.dataset.rank") == "1"
            assert "kill -9" in page.wait("document.getElementById('rank-detail').innerText")
        if seen[-1] == "send":
            break
    assert [name for name in seen if name in ("skip", "theme", "rank", "question", "send")] == [
        *("skip", "theme", "rank", "question", "send")
    ]
    ask(page, "hello hello hello", most_tokens=3900)
    page.wait("document.querySelector('.turn.it .words')?.textContent.length > 5")
    page.press("Escape")
    page.wait("document.querySelector('.turn.it .foot')?.textContent.includes('stopped') === true")
    page.wait("document.getElementById('running').textContent === '0'")


@pytest.mark.parametrize("width", [360, 412, 768])
def test_narrow_screens(page: Browser, width: int) -> None:
    page.size(width, 780, phone=True)
    page.wait(f"innerWidth === {width}")
    assert page.run("document.documentElement.scrollWidth") == width
    wider = "[...document.querySelectorAll('main *')].filter((n) => n.getBoundingClientRect().right > innerWidth + 1)"
    assert page.run(f"{wider}.map((node) => node.outerHTML.slice(0, 80))") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(page: Browser, scheme: str) -> None:
    page.prefer(colour_scheme=scheme)
    page.run(
        "document.querySelector('#world .rank').click(); document.querySelector('#faults button')?.click()"
    )
    background = page.run("getComputedStyle(document.body).backgroundColor")
    ratio, text, checked = page.run(LOWEST_CONTRAST)
    assert checked > 25 and ratio >= 4.5, f"{text!r} has {ratio:.2f} on {scheme} ({background})"
    page.run("document.getElementById('theme').click()")  # to light, whatever the system says
    light = page.run("getComputedStyle(document.body).backgroundColor")
    assert (light == background) == (scheme == "light")
    page.run("document.getElementById('theme').click()")  # to dark
    assert page.run("getComputedStyle(document.body).backgroundColor") != light
    page.run("document.getElementById('theme').click()")
