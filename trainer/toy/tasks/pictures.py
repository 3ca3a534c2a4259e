"""Pictures of the toy tasks: things of any shape, style and place, marked points, boxes, a window; plain data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from trainer.toy.world import (
    CELL_PX,
    COLORS,
    GRID,
    IMAGE_PX,
    SHAPES,
    SQUARE_SIDE,
    SUPERSAMPLE,
    TRIANGLE_BASE,
    blank_canvas,
    draw_shape,
    photograph,
    sample_background,
    sample_light,
)

LABELS = {"a": (255, 0, 255), "b": (0, 255, 255), "c": (255, 255, 255), "d": (0, 0, 0)}
"""Points and boxes are told apart by colours that no thing has."""
REFERENCE = "reference"
"""The point that a question starts from: black with a white rim."""
TEXTURES = ("plain", "stripes", "checks")
PALETTES = ("bright", "pale", "dark")
OUTLINES = {"none": None, "black": (15, 15, 15), "white": (245, 245, 245)}
GRAY = "gray"
_GRAY_RGB = (230, 230, 230)
_TEXTURE_PX = 2
_TEXTURE_SHADE = 0.45
_MARK_PX = 5
CELLS = tuple((row, column) for row in range(GRID) for column in range(GRID))
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape. turns: quarter turns clockwise. reflectance: brightness of its own, whatever the light."""

    shape: str
    color: str
    x_px: float
    y_px: float
    radius_px: float
    turns: int = 0
    reflectance: float = 1.0

    @property
    def name(self) -> str:
        """Colour and shape in words."""
        return f"{self.color} {self.shape}"

    @property
    def box(self) -> Box:
        """The smallest box around it, if it is one of SHAPES and not turned."""
        x, y, r = self.x_px, self.y_px, self.radius_px
        if self.shape == "circle":
            return x - r, y - r, x + r, y + r
        if self.shape == "square":
            return x - SQUARE_SIDE * r, y - SQUARE_SIDE * r, x + SQUARE_SIDE * r, y + SQUARE_SIDE * r
        return x - r, y - r, x + r, y + TRIANGLE_BASE * r


@dataclass(frozen=True, slots=True)
class Style:
    """How all things of a picture are rendered."""

    texture: str = "plain"
    palette: str = "bright"
    outline: str = "none"


@dataclass(frozen=True, slots=True)
class Picture:
    """What one image shows.

    light: relative brightness at the left and right edge. points: label (of LABELS, or REFERENCE) and place.
    boxes: label and box. window: the part that is shown, the rest is black; hidden: a part that is black.
    """

    things: tuple[Thing, ...]
    light: tuple[float, float]
    background: int
    style: Style = Style()
    points: tuple[tuple[str, float, float], ...] = ()
    boxes: tuple[tuple[str, Box], ...] = ()
    window: Box | None = None
    hidden: Box | None = None


def new_picture(things: list[Thing], rng: np.random.Generator, style: Style | None = None) -> Picture:
    """These things under a light and before a background of their own."""
    return Picture(tuple(things), sample_light(rng), sample_background(rng), style or Style())


def sample_thing(rng: np.random.Generator, x_px: float, y_px: float, radius_px: float) -> Thing:
    """A thing of any colour and shape at a place."""
    return Thing(str(rng.choice(SHAPES)), str(rng.choice(list(COLORS))), x_px, y_px, radius_px)


def in_cell(rng: np.random.Generator, row: int, column: int, jitter_px: float = 1.5) -> Thing:
    """A thing of any colour and shape in a cell of the 3×3 grid, as the toy world's scenes have them."""
    x, y = (CELL_PX * (i + 0.5) + float(rng.uniform(-jitter_px, jitter_px)) for i in (column, row))
    return sample_thing(rng, x, y, float(rng.uniform(4.2, 6.0)))


def sample_cells(rng: np.random.Generator, n: int) -> list[tuple[int, int]]:
    """N cells (row, column) of the grid in any order, each once."""
    return [CELLS[int(i)] for i in rng.permutation(len(CELLS))[:n]]


def draw(picture: Picture, rng: np.random.Generator) -> Image.Image:
    """The image; `rng` makes its noise. Points and boxes are drawn over it, neither lit nor noisy."""
    canvas = _draw_things(picture, shade=1.0)
    if picture.style.texture != "plain":
        canvas.paste(_draw_things(picture, shade=_TEXTURE_SHADE), mask=_texture(picture.style.texture))
    image = photograph(canvas, picture.light, rng)
    over = ImageDraw.Draw(image)
    if picture.window is not None:
        left, top, right, bottom = _whole_pixels(picture.window)
        shown = image.crop((left, top, right, bottom))
        over.rectangle((0, 0, IMAGE_PX, IMAGE_PX), fill=(0, 0, 0))
        image.paste(shown, (left, top))
    if picture.hidden is not None:
        left, top, right, bottom = _whole_pixels(picture.hidden)
        over.rectangle((left, top, right - 1, bottom - 1), fill=(0, 0, 0))
    for label, box in picture.boxes:
        left, top, right, bottom = _whole_pixels(box)
        over.rectangle((left - 1, top - 1, right, bottom), outline=LABELS[label])
    for label, x, y in picture.points:
        left, top = round(x - _MARK_PX / 2), round(y - _MARK_PX / 2)
        square = (left, top, left + _MARK_PX - 1, top + _MARK_PX - 1)
        if label == REFERENCE:
            over.rectangle(square, fill=LABELS["d"], outline=LABELS["c"])
        else:
            over.rectangle(square, fill=LABELS[label])
    return image


def _whole_pixels(box: Box) -> tuple[int, int, int, int]:
    left, top, right, bottom = (round(edge) for edge in box)
    return left, top, right, bottom


def _draw_things(picture: Picture, shade: float) -> Image.Image:
    canvas = blank_canvas(picture.background)
    over = ImageDraw.Draw(canvas)
    outline = OUTLINES[picture.style.outline]
    for thing in picture.things:
        fill = _fill(thing, picture.style.palette, shade)
        if thing.shape in SHAPES and not thing.turns:
            draw_shape(over, thing.shape, thing.x_px, thing.y_px, thing.radius_px, fill, outline)
        else:
            _draw_part(over, thing, fill)
    return canvas


def _fill(thing: Thing, palette: str, shade: float) -> tuple[int, int, int]:
    rgb = np.array(_GRAY_RGB if thing.color == GRAY else COLORS[thing.color], dtype=float)
    if palette == "pale":
        rgb = 0.45 * rgb + 0.55 * 255
    elif palette == "dark":
        rgb = 0.5 * rgb
    red, green, blue = (int(channel) for channel in (rgb * thing.reflectance * shade).round())
    return red, green, blue


def _texture(texture: str) -> Image.Image:
    """A mask that is white where the texture darkens."""
    index = np.arange(IMAGE_PX * SUPERSAMPLE) // (_TEXTURE_PX * SUPERSAMPLE)
    dark = (index[:, None] + (index[None, :] if texture == "checks" else 0)) % 2 == 1
    return Image.fromarray(np.where(np.broadcast_to(dark, (len(index), len(index))), 255, 0).astype(np.uint8))


PARTS: dict[str, tuple[tuple[tuple[float, float], ...], ...]] = {
    "triangle": (((0, -1), (-1, 0.8), (1, 0.8)),),
    "wedge": (((-0.45, -1), (-0.45, 1), (1, 1)),),
    "bar": (((-0.35, -1.1), (0.35, -1.1), (0.35, 1.1), (-0.35, 1.1)),),
    "rails": tuple(((x, -1.1), (x + 0.4, -1.1), (x + 0.4, 1.1), (x, 1.1)) for x in (-0.75, 0.35)),
    "square": (((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),),
}
"""Polygons in radii around the centre, before turning."""


def _draw_part(over: ImageDraw.ImageDraw, thing: Thing, fill: tuple[int, int, int]) -> None:
    """Shapes that turn, and the hollow ones (`ring`, `frame`)."""
    x, y, r = (value * SUPERSAMPLE for value in (thing.x_px, thing.y_px, thing.radius_px))
    width = round(0.4 * r)
    if thing.shape in ("ring", "circle"):
        hollow = thing.shape == "ring"
        over.ellipse((x - r, y - r, x + r, y + r), fill=None if hollow else fill, outline=fill, width=width)
    elif thing.shape == "frame":
        over.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), outline=fill, width=width)
    else:
        for polygon in PARTS[thing.shape]:
            corners = [turned(dx, dy, thing.turns) for dx, dy in polygon]
            over.polygon([(x + r * dx, y + r * dy) for dx, dy in corners], fill=fill)


def turned(dx: float, dy: float, turns: int) -> tuple[float, float]:
    """An offset after quarter turns clockwise (y points down)."""
    for _ in range(turns % 4):
        dx, dy = -dy, dx
    return dx, dy
