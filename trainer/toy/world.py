"""Scenes of the toy world: 1 to 5 coloured shapes on a 3×3 grid, drawn with jitter, noise and lighting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

COLORS = {"red": (214, 40, 40), "green": (40, 170, 70), "blue": (50, 80, 220), "yellow": (235, 205, 40)}
SHAPES = ("circle", "square", "triangle")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
GRID = 3
CELL_PX = 16
IMAGE_PX = GRID * CELL_PX
MAX_OBJECTS = 5
SUPERSAMPLE = 3
SQUARE_SIDE, TRIANGLE_BASE = 0.88, 0.8
"""Half the side of a square, and how far a triangle's base lies below its centre, in radii."""


@dataclass(frozen=True, slots=True)
class ToyObject:
    """One shape. row, column: cell on the grid; x_px, y_px: centre in the image; radius_px: half its size."""

    color: str
    shape: str
    row: int
    column: int
    x_px: float
    y_px: float
    radius_px: float


@dataclass(frozen=True, slots=True)
class ToyScene:
    """What one image shows. light: relative brightness at the left and right edge."""

    objects: tuple[ToyObject, ...]
    light: tuple[float, float]
    background: int


def sample_scene(rng: np.random.Generator) -> ToyScene:
    """A random scene; the number of objects is uniform on 1 … MAX_OBJECTS."""
    cells = rng.permutation(GRID * GRID)[: rng.integers(1, MAX_OBJECTS + 1)]
    objects = []
    for cell in sorted(int(c) for c in cells):
        row, column = divmod(cell, GRID)
        x_px, y_px = (CELL_PX * (i + 0.5) + rng.uniform(-1.5, 1.5) for i in (column, row))
        color = str(rng.choice(list(COLORS)))
        shape = str(rng.choice(SHAPES))
        objects.append(ToyObject(color, shape, row, column, x_px, y_px, float(rng.uniform(4.2, 6.0))))
    return ToyScene(tuple(objects), sample_light(rng), sample_background(rng))


def sample_light(rng: np.random.Generator) -> tuple[float, float]:
    """Relative brightness at the left and right edge."""
    left, right = rng.uniform(0.75, 1.1, size=2)
    return float(left), float(right)


def sample_background(rng: np.random.Generator) -> int:
    """A grey that no shape has."""
    return int(rng.integers(105, 150))


def render(scene: ToyScene, rng: np.random.Generator) -> Image.Image:
    """Draw a scene as an IMAGE_PX × IMAGE_PX RGB image; `rng` makes the pixel noise."""
    canvas = blank_canvas(scene.background)
    draw = ImageDraw.Draw(canvas)
    for o in scene.objects:
        draw_shape(draw, o.shape, o.x_px, o.y_px, o.radius_px, COLORS[o.color])
    return photograph(canvas, scene.light, rng)


def blank_canvas(background: int) -> Image.Image:
    """A grey canvas in the finer pixels that shapes are drawn in."""
    return Image.new("RGB", (IMAGE_PX * SUPERSAMPLE, IMAGE_PX * SUPERSAMPLE), (background,) * 3)


def draw_shape(
    draw: ImageDraw.ImageDraw,
    shape: str,
    x_px: float,
    y_px: float,
    radius_px: float,
    fill: tuple[int, int, int],
    outline: tuple[int, int, int] | None = None,
) -> None:
    """Draw one of SHAPES; an outline is one pixel wide."""
    x, y, r = x_px * SUPERSAMPLE, y_px * SUPERSAMPLE, radius_px * SUPERSAMPLE
    line: dict[str, Any] = {"fill": fill, "outline": outline, "width": SUPERSAMPLE}
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), **line)
    elif shape == "square":
        side = SQUARE_SIDE * r
        draw.rectangle((x - side, y - side, x + side, y + side), **line)
    else:
        draw.polygon([(x, y - r), (x - r, y + TRIANGLE_BASE * r), (x + r, y + TRIANGLE_BASE * r)], **line)


def photograph(canvas: Image.Image, light: tuple[float, float], rng: np.random.Generator) -> Image.Image:
    """The canvas in image pixels, lit from `light[0]` at the left edge to `light[1]` at the right, with noise."""
    pixels = np.asarray(canvas.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BOX), dtype=np.float32)
    pixels = pixels * np.linspace(*light, IMAGE_PX, dtype=np.float32)[None, :, None]
    pixels += rng.normal(0.0, 5.0, size=pixels.shape).astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
