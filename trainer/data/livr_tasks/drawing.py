"""Marks on pictures: labelled points and boxes, as large as the picture asks for."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_MARK = (255, 0, 0)
_RADIUS_SHARE = 0.015
_FONT_SHARE = 0.045
Point = tuple[float, float]
Box = tuple[float, float, float, float]


def with_points(image: Image.Image, points: Sequence[Point], labels: Sequence[str]) -> Image.Image:
    """A copy with a circle around each (x, y) in pixels and its label beside it, inside of the picture."""
    marked = image.copy()
    pen, radius = ImageDraw.Draw(marked), max(3.0, _RADIUS_SHARE * max(image.size))
    font = ImageFont.load_default(max(10.0, _FONT_SHARE * max(image.size)))
    for (x, y), label in zip(points, labels, strict=True):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=_MARK, width=max(1, round(radius / 3)))
        left, top, right, bottom = pen.textbbox((0, 0), label, font=font)
        text_x = min(x + 1.5 * radius, image.width - (right - left))
        text_y = min(max(y - (bottom - top) - radius, 0), image.height - (bottom - top))
        pen.text((text_x, text_y), label, fill=_MARK, font=font)
    return marked


def with_box(image: Image.Image, box: Box, label: str) -> Image.Image:
    """A copy with one labelled box (x0, y0, x1, y1)."""
    marked = image.copy()
    pen = ImageDraw.Draw(marked)
    pen.rectangle(box, outline=_MARK, width=max(2, round(0.006 * max(image.size))))
    font = ImageFont.load_default(max(10.0, _FONT_SHARE * max(image.size)))
    pen.text((box[0] + 4, box[1] + 2), label, fill=_MARK, font=font)
    return marked


def intersection_over_union(a: Box, b: Box) -> float:
    """Of two boxes (x0, y0, x1, y1)."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / area
