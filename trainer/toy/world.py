"""Scenes of the toy world: 1 to 5 coloured shapes on a 3×3 grid, drawn with jitter, noise and lighting."""

from __future__ import annotations

from dataclasses import dataclass

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
_SUPERSAMPLE = 3


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
    left, right = rng.uniform(0.75, 1.1, size=2)
    return ToyScene(tuple(objects), (float(left), float(right)), int(rng.integers(105, 150)))


def render(scene: ToyScene, rng: np.random.Generator) -> Image.Image:
    """Draw a scene as an IMAGE_PX × IMAGE_PX RGB image; `rng` makes the pixel noise."""
    scale = _SUPERSAMPLE
    canvas = Image.new("RGB", (IMAGE_PX * scale, IMAGE_PX * scale), (scene.background,) * 3)
    draw = ImageDraw.Draw(canvas)
    for o in scene.objects:
        x, y, r = o.x_px * scale, o.y_px * scale, o.radius_px * scale
        if o.shape == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=COLORS[o.color])
        elif o.shape == "square":
            side = 0.88 * r
            draw.rectangle((x - side, y - side, x + side, y + side), fill=COLORS[o.color])
        else:
            draw.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], fill=COLORS[o.color])
    pixels = np.asarray(canvas.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BOX), dtype=np.float32)
    pixels = pixels * np.linspace(*scene.light, IMAGE_PX, dtype=np.float32)[None, :, None]
    pixels += rng.normal(0.0, 5.0, size=pixels.shape).astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
