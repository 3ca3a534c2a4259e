"""Every row of the benchmark that needs no cluster runs at a tiny size, and says what it should."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.benchmarks.bench import Bench
from tests.benchmarks.models import PROPORTIONS_7B
from tests.benchmarks.plot import Panel, draw
from tests.benchmarks.read_memory import memory_rows
from tests.benchmarks.read_rows import growth_rows, speed_rows, switch_rows
from tests.benchmarks.step_rows import step_rows
from tests.benchmarks.switches import READ_SWITCHES, STEP_SWITCHES
from tests.benchmarks.timing import interleaved, ratios, result


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), "a test", repetitions=2, tiny=True)


def test_sides_are_timed_in_turn_and_the_order_turns_round() -> None:
    calls: list[str] = []
    sides = {"a": lambda: (calls.append("a"), time.sleep(0.02)), "b": lambda: calls.append("b")}
    seconds = interleaved(sides, repetitions=2, warmups=1)
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert [len(s) for s in seconds.values()] == [2, 2]
    assert min(seconds["a"]) >= 0.02


def test_results_are_medians_of_ratios_within_a_repetition() -> None:
    row = result("f", ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]), "×", "c", at_least=2.5)
    assert (row.value, row.low, row.high, row.n, row.bar, row.met) == (2.0, 1.0, 3.0, 3, "≥ 2.5", False)
    assert result("f", [1.0], "×", "c", at_most=1.0).met is True
    assert result("f", [1.0], "×", "c").met is None


def test_speed_rows(bench: Bench) -> None:
    speed, share, error = speed_rows(bench, "tiny", PROPORTIONS_7B, 3, at_least=2.2)
    assert speed.bar == "≥ 2.2"
    by_count = speed.value / share.value
    assert 1.5 < by_count < 3.5
    assert 0 < error.value <= 1e-5
    assert error.met is True


def test_every_switch_has_a_row(bench: Bench) -> None:
    rows = switch_rows(bench, "tiny", PROPORTIONS_7B)
    assert [name for name in READ_SWITCHES for row in rows if f"without {name}," in row.figure] == list(READ_SWITCHES)
    assert all(row.value > 0 for row in rows)


def test_growth_rows_and_their_picture(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("N_QUESTIONS_GROWTH", "N_LATENTS_GROWTH", "N_IMAGES_GROWTH"):
        monkeypatch.setattr(f"tests.benchmarks.read_rows.{name}", (1, 4))
    rows, panels = growth_rows(bench, "tiny", PROPORTIONS_7B)
    assert [panel.sizes for panel in panels] == [[1, 4]] * 3
    assert all(panel.counted_s[-1] == pytest.approx(panel.measured_s[-1]) for panel in panels)
    assert panels[2].counted_s[0] == pytest.approx(panels[2].counted_s[1] / 4), "images count in proportion"
    assert len(rows) == 3
    draw(panels, tmp_path / "growth.png")
    with Image.open(tmp_path / "growth.png") as image:
        assert len(image.getcolors()) > 3


def test_points_lie_where_their_values_say(tmp_path: Path) -> None:
    draw([Panel("n", [1, 100], [0.1, 10.0], [0.1, 10.0])], tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        pixels = image.convert("RGB")
        blue = [(x, y) for x in range(image.width) for y in range(40, image.height) if pixels.getpixel((x, y))[0] < 40]
    left, right = min(blue), max(blue)
    assert left[0] < 80
    assert right[0] > 380
    assert left[1] > 280
    assert statistics.median(y for x, y in blue if x > 380) < 70


def test_memory_rows(bench: Bench) -> None:
    ratio, *without = memory_rows(bench, "tiny", PROPORTIONS_7B, at_most=0.35)
    assert 0 < ratio.low <= ratio.high < 1
    assert all(f"without {name}," in row.figure for name, row in zip(READ_SWITCHES, without, strict=True))


def test_step_rows(bench: Bench) -> None:
    rows = step_rows(bench, "tiny", PROPORTIONS_7B)
    assert [row.bar for row in rows] == ["≥ 1.5", "≥ 1.5", "≥ 1.8"] + ["–"] * len(STEP_SWITCHES)
    assert all(row.value > 0 for row in rows)
