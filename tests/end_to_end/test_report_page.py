"""The report of two runs in a real browser: it draws everything, asks for nothing, complains of nothing."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.chromium import CHROMIUM, Chromium
from tests.report_run import write_run

ROOT = Path(__file__).parents[2]
PHONE, DESKTOP = (390, 844), (1280, 900)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; apt-get install chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    runs = [write_run(folder / "first"), write_run(folder / "second", seed=1)]
    command = [sys.executable, "-m", "trainer", "report", *map(str, runs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return runs[0] / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_the_page_is_whole_quiet_and_fits(page: Path, browser: Chromium, tmp_path: Path, size, dark) -> None:
    browser.open(page, width=size[0], height=size[1], dark=dark)
    assert browser.evaluate("document.images.length") >= 2 * 17
    assert browser.evaluate("[...document.images].filter(image => !(image.naturalWidth > 0)).length") == 0
    assert browser.complaints == []
    assert [address for address in browser.requests if not address.startswith("data:")] == [page.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "wide tables scroll alone"
    shown = browser.evaluate("document.querySelector('picture img').currentSrc")
    in_dark = browser.evaluate("document.querySelector('picture source').srcset")
    assert (shown == in_dark) == dark
    browser.screenshot(tmp_path / "page.png")
    corner = Image.open(tmp_path / "page.png").convert("L").getpixel((2, 2))
    assert corner < 60 if dark else corner > 200


def test_the_policy_refuses_what_the_page_does_not_hold(page: Path, browser: Chromium, tmp_path: Path) -> None:
    """Proof that the browser obeys the policy, and that the test above would hear of a complaint."""
    meddled = tmp_path / "meddled.html"
    html = page.read_text()
    meddled.write_text(html.replace("</main>", '<p style="color: red">x</p><script>x = 1</script></main>'))
    browser.open(meddled, width=800, height=600, dark=False)
    assert sum("Content Security Policy" in complaint for complaint in browser.complaints) == 2
