"""A toy task with an auxiliary image: the shape of a tiny thing, which an enlarged crop shows plainly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from trainer.toy.tasks.example import Example, Hint
from trainer.toy.tasks.pictures import Picture, Thing, new_picture, sample_thing
from trainer.toy.world import COLORS, IMAGE_PX

_FINE_GRID = 4
_OTHERS = (3, 6)
_RADII_PX = (2.6, 3.4)
_ZOOM = 2.2


def small_shape(rng: np.random.Generator, answer: str) -> Example:
    """Which shape has the thing of the named colour? It is about three pixels in radius; others have other colours.

    The hint is the part of the picture around the thing, enlarged to the size of ordinary things.
    """
    color = str(rng.choice(list(COLORS)))
    cell_px = IMAGE_PX / _FINE_GRID
    things: list[Thing] = []
    for cell in rng.permutation(_FINE_GRID**2)[: 1 + int(rng.integers(_OTHERS[0], _OTHERS[1] + 1))]:
        row, column = divmod(int(cell), _FINE_GRID)
        x, y = (cell_px * (i + 0.5) + float(rng.uniform(-1.5, 1.5)) for i in (column, row))
        thing = sample_thing(rng, x, y, float(rng.uniform(*_RADII_PX)))
        if not things:
            thing = replace(thing, color=color, shape=answer)
        while things and thing.color == color:
            thing = replace(thing, color=str(rng.choice(list(COLORS))))
        things.append(thing)
    target = things[0]
    picture = new_picture(things, rng)
    hint = Hint(enlarged(picture, target), f"a {target.name}")
    return Example((picture,), f"what shape is the {color} thing?", answer, hint)


def enlarged(picture: Picture, thing: Thing) -> Picture:
    """The picture as seen from closer, with the thing in the middle, in the light that falls on it."""
    things = tuple(
        replace(
            t,
            x_px=IMAGE_PX / 2 + _ZOOM * (t.x_px - thing.x_px),
            y_px=IMAGE_PX / 2 + _ZOOM * (t.y_px - thing.y_px),
            radius_px=_ZOOM * t.radius_px,
        )
        for t in picture.things
    )
    left, right = picture.light
    light = left + (right - left) * thing.x_px / IMAGE_PX
    return replace(picture, things=things, light=(light, light))
