"""The served page in a real browser, before a real service: pick, ask, stream, heat map, swap, errors, phone, dark.

Screenshots are left in runs/screenshots.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chromium import CHROMIUM, Chromium
from trainer.toy.page_examples import example

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "runs/screenshots"
PHONE, DESKTOP = (390, 844), (1280, 900)
DONE = "document.querySelectorAll('#answers article[aria-busy=false]').length === 3"
WATCH_FOR_EARLY_TEXT = """new MutationObserver(() => {
  window.early ||= [...document.querySelectorAll('article[aria-busy=true] .answer')].some((text) => text.textContent);
}).observe(document.body, { subtree: true, childList: true }); 1"""
COLORS = """(() => {
  const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
  const withText = [...document.querySelectorAll('h1, h2, h3, p, summary, label, legend, button, textarea, dt, dd')];
  return withText.filter((one) => one.textContent.trim() && !one.disabled).map((one) => {
    let behind = one;
    while (behind && rgb(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
    const background = rgb(getComputedStyle(behind).backgroundColor);
    return [one.outerHTML.slice(0, 80), rgb(getComputedStyle(one).color), background];
  });
})()"""
MODELS = ["A", "B", "joint"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; apt-get install chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with Chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


def take_example(browser: Chromium) -> None:
    browser.evaluate("document.querySelector('#examples button').click()")
    browser.wait_for("!document.getElementById('picture').hidden")


def ask(browser: Chromium) -> None:
    browser.evaluate("document.getElementById('ask').click()")
    browser.wait_for(f"!document.getElementById('status').textContent.startsWith('Asking') && {DONE}")


def message(browser: Chromium) -> str:
    return browser.evaluate("document.getElementById('message').textContent")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_an_example_is_asked_and_answered(
    service_url: str, browser: Chromium, size: tuple[int, int], dark: bool
) -> None:
    browser.open(service_url, width=size[0], height=size[1], dark=dark)
    take_example(browser)
    assert browser.evaluate("document.getElementById('question').value") == "what color is the circle?"
    browser.evaluate(WATCH_FOR_EARLY_TEXT)
    ask(browser)
    assert message(browser) == ""
    assert browser.evaluate("window.early"), "text stands there before the answer is complete"
    names = browser.evaluate("[...document.querySelectorAll('article h3')].map((title) => title.textContent)")
    assert [name.split(":")[0] for name in names] == MODELS
    assert all(browser.evaluate("[...document.querySelectorAll('.answer')].map((answer) => answer.textContent)"))
    figures = browser.evaluate("[...document.querySelectorAll('dl > div')].map((row) => row.textContent)")
    assert len(figures) == 3 * 2
    assert all("log p " in figure for figure in figures)
    widths = browser.evaluate("[...document.querySelectorAll('.bar')].map((bar) => parseFloat(bar.style.width))")
    assert all(0 <= width <= 100 for width in widths)
    assert max(widths) > 0
    browser.wait_for("document.getElementById('heat').naturalWidth > 0 && !document.getElementById('heat').hidden")
    assert browser.evaluate("document.getElementById('status').textContent").startswith("A: ")
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.complaints == [], "the policy allows all that the page does"
    asked = {address for address in browser.requests if not address.startswith("data:")}
    assert asked == {service_url, f"{service_url}v1/models", f"{service_url}v1/chat/completions"}
    where = "phone" if size == PHONE else "desktop"
    browser.screenshot(SCREENSHOTS / f"answers_{where}_{'dark' if dark else 'light'}.png")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_from_its_background(service_url: str, browser: Chromium, dark: bool) -> None:
    """At least 4.5 : 1, WCAG 2.2 success criterion 1.4.3; what is switched off is exempt."""
    browser.open(service_url, width=DESKTOP[0], height=DESKTOP[1], dark=dark)
    take_example(browser)
    ask(browser)
    pairs = browser.evaluate(COLORS)
    assert len(pairs) > 20
    too_weak = [(what, contrast(color, behind)) for what, color, behind in pairs if contrast(color, behind) < 4.5]
    assert too_weak == []


def contrast(one: list[float], other: list[float]) -> float:
    """Ratio of relative luminances, WCAG 2.2."""

    def luminance(color: list[float]) -> float:
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in color[:3])]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


def test_it_can_be_used_with_a_keyboard_and_a_screen_reader(service_url: str, browser: Chromium) -> None:
    browser.open(service_url, width=DESKTOP[0], height=DESKTOP[1], dark=False)
    reached = []
    for _ in range(8):
        browser.press("Tab", 9)
        reached.append(browser.evaluate("document.activeElement.id || document.activeElement.tagName"))
        if len(reached) == 2:
            browser.press("Enter", 13, "\r")  # takes the first example
    assert reached == ["SUMMARY", "BUTTON", "BUTTON", "BUTTON", "file", "question", "INPUT", "ask"]
    browser.evaluate("document.getElementById('question').focus()")
    browser.press("Enter", 13, "\r")
    browser.wait_for(DONE)
    tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    shown = [node for node in tree if not node["ignored"]]
    for role in ("button", "textbox", "radio", "checkbox", "image", "region"):
        names = [node["name"]["value"] for node in shown if node["role"]["value"] == role]
        assert names, role
        assert all(names), role
    assert browser.evaluate("document.getElementById('status').getAttribute('role')") == "status"
    assert browser.evaluate("document.getElementById('message').getAttribute('role')") == "alert"


def test_an_image_of_ones_own_and_other_latents(service_url: str, browser: Chromium, tmp_path: Path) -> None:
    example(3)[1].save(tmp_path / "mine.png")
    browser.open(service_url, width=DESKTOP[0], height=DESKTOP[1], dark=False)
    browser.choose_file("#file", tmp_path / "mine.png")
    browser.wait_for("document.getElementById('shown').alt === 'mine.png'")
    browser.evaluate("document.getElementById('question').value = 'what color is the square?'")
    ask(browser)
    own = browser.evaluate("document.querySelector('.answer').textContent")
    for swap, named in (("noise", "noise"), ("other_image", "latents of another image")):
        browser.evaluate(f"document.querySelector('input[value={swap}]').click()")
        ask(browser)
        assert message(browser) == ""
        now = browser.evaluate("document.querySelector('.answer').textContent")
        note = browser.evaluate("document.querySelector('article .hint').textContent")
        assert note == f"from {named}; with its own latents " + ("the same" if now == own else f"“{own}”")
        browser.screenshot(SCREENSHOTS / f"swap_{swap}.png")
    browser.evaluate("document.getElementById('map').click()")
    assert browser.evaluate("document.getElementById('heat').hidden")


def test_what_goes_wrong_is_said(service_url: str, browser: Chromium, tmp_path: Path) -> None:
    browser.open(service_url, width=PHONE[0], height=PHONE[1], dark=True)
    browser.evaluate("document.getElementById('ask').click()")
    assert "Take an image first" in message(browser)
    (tmp_path / "notes.txt").write_text("no image")
    browser.choose_file("#file", tmp_path / "notes.txt")
    browser.wait_for("document.getElementById('message').textContent.includes('notes.txt is not an image')")
    take_example(browser)
    browser.evaluate("document.getElementById('question').value = ' '; document.getElementById('ask').click()")
    assert "Type a question" in message(browser)
    browser.evaluate("document.getElementById('question').value = 'what? '.repeat(1000)")
    ask(browser)
    assert "2000" in message(browser), "the service's own words, with its bound"
    assert "Request " in browser.evaluate("document.querySelector('article .wrong').textContent")
    browser.screenshot(SCREENSHOTS / "error_phone_dark.png")
    browser.evaluate("document.getElementById('question').value = 'what color is the circle?'")
    browser.cut_off(True)
    browser.evaluate("document.getElementById('ask').click()")
    browser.wait_for("document.getElementById('message').textContent.includes('cannot be reached')")
    browser.cut_off(False)


def test_a_question_can_be_stopped(service_url: str, browser: Chromium) -> None:
    browser.open(service_url, width=DESKTOP[0], height=DESKTOP[1], dark=False)
    take_example(browser)
    browser.evaluate("document.getElementById('ask').click(); document.getElementById('stop').click()")
    browser.wait_for(DONE)
    notes = browser.evaluate("[...document.querySelectorAll('article .hint')].map((note) => note.textContent)")
    assert notes == ["Stopped."] * 3
    assert browser.evaluate("document.getElementById('stop').disabled")
    ask(browser)
    assert message(browser) == ""
    assert all(browser.evaluate("[...document.querySelectorAll('.answer')].map((answer) => answer.textContent)"))
