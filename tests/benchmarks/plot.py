"""The one picture of the benchmark: measured times as points, the FLOP count as a line, on logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_PANEL_PX, _HEIGHT_PX, _LEFT_PX, _RIGHT_PX, _TOP_PX, _BOTTOM_PX = 420, 360, 70, 20, 50, 60
_INK, _GRID = "#333333", "#dddddd"
_MEASURED, _COUNTED = "#0072B2", "#D55E00"  # blue and vermilion of Okabe & Ito (2008), told apart by all kinds of sight
_FONT_PX = 15


@dataclass(frozen=True, slots=True)
class Panel:
    """One curve: sizes, measured seconds, and the seconds that the count would give."""

    label: str
    sizes: Sequence[int]
    measured_s: Sequence[float]
    counted_s: Sequence[float]


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Write the panels side by side as a PNG; all share the time axis."""
    image = Image.new("RGB", (_PANEL_PX * len(panels), _HEIGHT_PX), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(_FONT_PX)
    times = [t for panel in panels for t in (*panel.measured_s, *panel.counted_s)]
    y = _log_scale(min(times), max(times), _HEIGHT_PX - _BOTTOM_PX, _TOP_PX)
    for i, panel in enumerate(panels):
        left = i * _PANEL_PX + _LEFT_PX
        right = (i + 1) * _PANEL_PX - _RIGHT_PX
        x = _log_scale(panel.sizes[0], panel.sizes[-1], left, right)
        for tick in _decades(min(times), max(times)):
            pen.line([(left, y(tick)), (right, y(tick))], fill=_GRID)
            pen.text((left - 8, y(tick)), f"{tick:g} s", fill=_INK, font=font, anchor="rm")
        for size in panel.sizes:
            pen.text((x(size), _HEIGHT_PX - _BOTTOM_PX + 8), str(size), fill=_INK, font=font, anchor="ma")
        pen.text(((left + right) / 2, _HEIGHT_PX - 24), panel.label, fill=_INK, font=font, anchor="ma")
        line = [(x(size), y(t)) for size, t in zip(panel.sizes, panel.counted_s, strict=True)]
        pen.line(line, fill=_COUNTED, width=2)
        for size, t in zip(panel.sizes, panel.measured_s, strict=True):
            pen.ellipse([x(size) - 5, y(t) - 5, x(size) + 5, y(t) + 5], fill=_MEASURED)
    pen.ellipse([_LEFT_PX, 17, _LEFT_PX + 10, 27], fill=_MEASURED)
    pen.text((_LEFT_PX + 18, 22), "measured read", fill=_INK, font=font, anchor="lm")
    pen.line([(_LEFT_PX + 150, 22), (_LEFT_PX + 180, 22)], fill=_COUNTED, width=2)
    pen.text((_LEFT_PX + 188, 22), "in proportion to the FLOP count", fill=_INK, font=font, anchor="lm")
    image.quantize(32).save(path, optimize=True)


def _log_scale(low: float, high: float, first_px: float, last_px: float) -> Callable[[float], float]:
    span = math.log(high / low)
    return lambda value: first_px + (last_px - first_px) * math.log(value / low) / span


def _decades(low: float, high: float) -> list[float]:
    """1, 3, 10, … within the range."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**e for e in exponents for m in (1, 3) if low <= m * 10.0**e <= high]
