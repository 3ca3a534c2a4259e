"""Toy tasks about one image: counting, object localization, relative reflectance."""

from __future__ import annotations

import math

import numpy as np

from trainer.toy.tasks.example import Example
from trainer.toy.tasks.pictures import GRAY, Box, Picture, Style, Thing, new_picture, sample_cells, sample_thing
from trainer.toy.world import CELL_PX, COLORS, IMAGE_PX, SHAPES, sample_background

MAX_COUNT = 6
_MAX_OTHERS = 8
_FINE_GRID = 4
_IOU = (0.2, 0.5)
_DARKER = (1.45, 1.9)


def counting(rng: np.random.Generator, answer: str) -> Example:
    """How many small things of a colour, a shape or both lie among others, off the grid (PixMo-Count)."""
    color = str(rng.choice(list(COLORS))) if rng.random() < 2 / 3 else None
    shape = str(rng.choice(SHAPES)) if color is None or rng.random() < 0.5 else None
    n_things = int(answer) + int(rng.integers(2, _MAX_OTHERS + 1))
    cell_px = IMAGE_PX / _FINE_GRID
    things: list[Thing] = []
    for cell in rng.permutation(_FINE_GRID**2)[:n_things]:
        row, column = divmod(int(cell), _FINE_GRID)
        x, y = (cell_px * (i + 0.5) + float(rng.uniform(-1.5, 1.5)) for i in (column, row))
        counted = len(things) < int(answer)
        radius = float(rng.uniform(3.0, 4.4))
        while True:
            thing = sample_thing(rng, x, y, radius)
            if counted == (color in (None, thing.color) and shape in (None, thing.shape)):
                break
        things.append(thing)
    noun = f"{shape}s" if shape else "things"
    return Example((new_picture(things, rng),), f"how many {f'{color} ' if color else ''}{noun} are there?", answer)


def object_localization(rng: np.random.Generator, answer: str) -> Example:
    """Which of two boxes is the tighter around the named thing; the other is jittered to an IoU of .2 to .5 (COCO)."""
    radii = [float(rng.uniform(5.0, 8.0)), *(float(rng.uniform(3.0, 5.0)) for _ in range(rng.integers(2, 5)))]
    while True:
        things: list[Thing] = []
        for radius in radii:
            x, y = (float(rng.uniform(radius + 2, IMAGE_PX - radius - 2)) for _ in range(2))
            things.append(sample_thing(rng, x, y, radius))
        target, *others = things
        apart = all(
            math.hypot(one.x_px - other.x_px, one.y_px - other.y_px) > one.radius_px + other.radius_px
            for i, one in enumerate(things)
            for other in things[:i]
        )
        if apart and target.name not in [other.name for other in others]:
            break
    boxes = [target.box, jittered_box(rng, target.box)]
    if answer == "b":
        boxes.reverse()
    picture = new_picture(things, rng)
    labelled = Picture(picture.things, picture.light, picture.background, boxes=(("a", boxes[0]), ("b", boxes[1])))
    return Example((labelled,), f"which box is around the {target.name}?", answer)


def jittered_box(rng: np.random.Generator, box: Box) -> Box:
    """A box moved and scaled until its IoU with `box` is within bounds, inside the image."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    while True:
        scale = float(np.exp(rng.uniform(-0.5, 0.5)))
        x, y = (left + right) / 2 + width * rng.uniform(-0.7, 0.7), (top + bottom) / 2 + height * rng.uniform(-0.7, 0.7)
        half_width, half_height = scale * width / 2, scale * height / 2
        jittered = (float(x - half_width), float(y - half_height), float(x + half_width), float(y + half_height))
        inside = min(jittered[:2]) >= 1 and max(jittered[2:]) <= IMAGE_PX - 1
        if inside and _IOU[0] <= overlap(box, jittered) <= _IOU[1]:
            return jittered


def overlap(one: Box, two: Box) -> float:
    """Intersection over union of two boxes."""
    width = max(0.0, min(one[2], two[2]) - max(one[0], two[0]))
    height = max(0.0, min(one[3], two[3]) - max(one[1], two[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, two)]
    return width * height / (sum(areas) - width * height)


def relative_reflectance(rng: np.random.Generator, answer: str) -> Example:
    """Which of two marked grey things reflects less, in a light that falls off to one side (Multi-Illumination)."""
    dark = float(rng.uniform(0.38, 0.6))
    bright = dark * float(rng.uniform(*_DARKER))
    if answer == "none":
        of_a = of_b = float(rng.choice([dark, bright]))
    else:
        of_a, of_b = (dark, bright) if answer == "a" else (bright, dark)
    while True:
        cells = sample_cells(rng, int(rng.integers(3, 7)))
        if cells[0][1] != cells[1][1]:
            break
    things = []
    for i, (row, column) in enumerate(cells):
        x, y = (CELL_PX * (c + 0.5) + float(rng.uniform(-1.5, 1.5)) for c in (column, row))
        own = of_a if i == 0 else of_b if i == 1 else float(rng.uniform(0.38, 1.0))
        things.append(Thing(str(rng.choice(SHAPES)), GRAY, x, y, float(rng.uniform(5.5, 7.0)), reflectance=own))
    bright_side = float(rng.uniform(0.95, 1.1))
    light = [bright_side, bright_side * float(rng.uniform(0.45, 0.8))]
    if rng.random() < 0.5:
        light.reverse()
    points = tuple((label, things[i].x_px, things[i].y_px) for i, label in enumerate("ab"))
    picture = Picture(tuple(things), (light[0], light[1]), sample_background(rng), Style(outline="black"), points)
    return Example((picture,), "which point is darker, a or b or none?", answer)
