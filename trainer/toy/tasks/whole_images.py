"""Toy tasks that compare whole images: jigsaw, art style, visual similarity.

Where two candidates are shown, the wrong one is drawn as the right one is, so that without the first image there is
nothing to choose by.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from trainer.toy.tasks.example import Example
from trainer.toy.tasks.pictures import (
    CELLS,
    OUTLINES,
    PALETTES,
    TEXTURES,
    Picture,
    Style,
    Thing,
    in_cell,
    new_picture,
    sample_cells,
    sample_thing,
)
from trainer.toy.world import IMAGE_PX

QUADRANT = (IMAGE_PX / 2, IMAGE_PX / 2, float(IMAGE_PX), float(IMAGE_PX))
CUT_CELLS = ((1, 1), (1, 2), (2, 1))
"""Cells of the 3×3 grid that the bottom right quadrant cuts through; (2, 2) lies inside."""
_FILLED = 0.7
STYLES = tuple(Style(*parts) for parts in itertools.product(TEXTURES, PALETTES, OUTLINES))


def jigsaw(rng: np.random.Generator, answer: str) -> Example:
    """Which of two pieces is the missing bottom right quadrant (COCO crops); a piece lies in its place on black.

    Things at the cut lie half in the image and half in the piece; the wrong piece has other colours there, or nothing.
    """
    things = {cell: in_cell(rng, *cell) if rng.random() < _FILLED else None for cell in CELLS}
    wrong = dict(things)
    n_wrong = int(rng.integers(1, len(CUT_CELLS) + 1))
    for i in rng.permutation(len(CUT_CELLS))[:n_wrong]:
        cell = CUT_CELLS[int(i)]
        # Drawn as a pair until they differ: neither of two pieces is the likelier one by itself.
        while _color(things[cell]) == _color(wrong[cell]):
            model = in_cell(rng, *cell)
            things[cell], wrong[cell] = (_recolored(rng, model) for _ in range(2))
    whole = new_picture([thing for thing in things.values() if thing], rng)
    other = replace(whole, things=tuple(thing for thing in wrong.values() if thing))
    pieces = _ordered(replace(whole, window=QUADRANT), replace(other, window=QUADRANT), answer)
    return Example((replace(whole, hidden=QUADRANT), *pieces), "which piece fits the first image, a or b?", answer)


def _recolored(rng: np.random.Generator, thing: Thing) -> Thing | None:
    """The same thing in another colour, or none."""
    color = sample_thing(rng, 0, 0, 1).color
    return replace(thing, color=color) if rng.random() < _FILLED else None


def _color(thing: Thing | None) -> str | None:
    return thing.color if thing else None


def art_style(rng: np.random.Generator, answer: str) -> Example:
    """Which of two other scenes is rendered in the first one's style: texture, palette, outline (ArtBench-10)."""
    while True:
        right, wrong = (STYLES[int(i)] for i in rng.permutation(len(STYLES))[:2])
        if style_distance(right, wrong) <= 2:
            break
    reference, same, other = (_styled_scene(rng, style) for style in (right, right, wrong))
    return Example(
        (reference, *_ordered(same, other, answer)), "which has the style of the first image, a or b?", answer
    )


def style_distance(one: Style, two: Style) -> int:
    """In how many respects two styles differ."""
    return sum([one.texture != two.texture, one.palette != two.palette, one.outline != two.outline])


def _styled_scene(rng: np.random.Generator, style: Style) -> Picture:
    cells = sample_cells(rng, int(rng.integers(3, 6)))
    return new_picture([in_cell(rng, *cell) for cell in cells], rng, style)


def visual_similarity(rng: np.random.Generator, answer: str) -> Example:
    """Which of two variants of the first image has fewer things changed (NIGHTS): 1 or 2 against 2 more."""
    cells = sample_cells(rng, int(rng.integers(5, 8)))
    things = [in_cell(rng, *cell) for cell in cells]
    n_near = int(rng.integers(1, 3))
    near, far = (_changed(rng, things, n) for n in (n_near, n_near + 2))
    return Example(
        (new_picture(things, rng), *_ordered(near, far, answer)), "which is similar to the first image, a or b?", answer
    )


def _changed(rng: np.random.Generator, things: list[Thing], n: int) -> Picture:
    """A picture in which n things have another colour or shape, and all have moved a little."""
    changed = []
    to_change = set(rng.permutation(len(things))[:n].tolist())
    for i, thing in enumerate(things):
        x, y = (place + float(rng.uniform(-1, 1)) for place in (thing.x_px, thing.y_px))
        new = replace(thing, x_px=x, y_px=y)
        while i in to_change and new.name == thing.name:
            new = sample_thing(rng, x, y, thing.radius_px)
        changed.append(new)
    return new_picture(changed, rng)


def _ordered(right: Picture, wrong: Picture, answer: str) -> tuple[Picture, Picture]:
    """Second and third image, answers a and b."""
    return (right, wrong) if answer == "a" else (wrong, right)
