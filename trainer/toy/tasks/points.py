"""Toy tasks that carry a marked point over to another image: visual, semantic and functional correspondence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from trainer.toy.tasks.example import Example
from trainer.toy.tasks.pictures import (
    LABELS,
    REFERENCE,
    Picture,
    Thing,
    new_picture,
    sample_thing,
    turned,
)
from trainer.toy.world import CELL_PX, COLORS, IMAGE_PX

_WORLD_CELLS = 5
_VIEW_CELLS = 3
_FILLED = 0.85
_LOOKALIKE = 0.5
_QUESTION = "which point is the one of the first image?"

CREATURE = (
    ("body", "square", 0.0, 0.0, 7.0),
    ("head", "circle", 12.5, -4.5, 4.8),
    ("tail", "triangle", -12.5, -4.0, 4.8),
    ("front leg", "bar", 6.0, 11.5, 4.8),
    ("back leg", "bar", -6.0, 11.5, 4.8),
)
"""Part, shape, place and radius in pixels around the middle of a creature that looks to the right."""
CREATURE_PARTS = ("head", "tail", "front leg", "back leg")

FORMS = {"hold": ("bar", "rails"), "hit": ("square", "circle"), "cut": ("triangle", "wedge"), "hang": ("ring", "frame")}
"""Two forms that a part can have for what one does with it; two tools of different kinds never share one."""
_TOOLS = {
    "row": ((-16.0, 0.0), (-5.4, 0.0), (5.4, 0.0), (16.0, 0.0)),
    "block": ((-7.0, -7.0), (7.0, -7.0), (7.0, 7.0), (-7.0, 7.0)),
    "fork": ((0.0, 12.0), (0.0, 0.0), (-10.0, -10.0), (10.0, -10.0)),
}
"""Where the four parts of a kind of tool lie."""


def visual_correspondence(rng: np.random.Generator, answer: str) -> Example:
    """The same thing from another place, in another light (HPatches): the view moves over a larger world.

    It moves by a cell to any of eight sides, so places alone say nothing; often another point marks a thing that looks
    the same, and only its neighbours tell them apart.
    """
    things: dict[tuple[int, int], Thing] = {}
    for row in range(_WORLD_CELLS):
        for column in range(_WORLD_CELLS):
            if rng.random() < _FILLED:
                x, y = (CELL_PX * (i + 0.5) + float(rng.uniform(-1.5, 1.5)) for i in (column, row))
                things[row, column] = sample_thing(rng, x, y, float(rng.uniform(4.5, 6.0)))
    first = (1, 1)
    move = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)][int(rng.integers(8))]
    second = (1 + move[0], 1 + move[1])
    in_second = [cell for cell in things if _sees(second, cell)]
    shared = [cell for cell in in_second if _sees(first, cell)]
    if not shared or len(in_second) < len(LABELS):
        return visual_correspondence(rng, answer)
    target = shared[int(rng.integers(len(shared)))]
    others = [cell for cell in in_second if cell != target]
    others = [others[int(i)] for i in rng.permutation(len(others))[: len(LABELS) - 1]]
    if rng.random() < _LOOKALIKE:
        twin = things[others[0]]
        things[others[0]] = replace(twin, shape=things[target].shape, color=things[target].color)
    seen_first, seen_second = (_view(rng, things, corner) for corner in (first, second))
    points = _labelled(rng, [seen_second[target], *(seen_second[cell] for cell in others)], answer)
    reference = ((REFERENCE, seen_first[target].x_px, seen_first[target].y_px),)
    pictures = (
        replace(new_picture(list(seen_first.values()), rng), points=reference),
        replace(new_picture(list(seen_second.values()), rng), points=points),
    )
    return Example(pictures, _QUESTION, answer)


def _sees(corner: tuple[int, int], cell: tuple[int, int]) -> bool:
    return all(0 <= c - start < _VIEW_CELLS for c, start in zip(cell, corner, strict=True))


def _view(
    rng: np.random.Generator, things: dict[tuple[int, int], Thing], corner: tuple[int, int]
) -> dict[tuple[int, int], Thing]:
    """What is seen from a corner, moved a little as a whole."""
    dy, dx = (float(rng.uniform(-1.5, 1.5)) - CELL_PX * start for start in corner)
    return {
        cell: replace(thing, x_px=thing.x_px + dx, y_px=thing.y_px + dy)
        for cell, thing in things.items()
        if _sees(corner, cell)
    }


def _labelled(rng: np.random.Generator, things: list[Thing], answer: str) -> tuple[tuple[str, float, float], ...]:
    """A point on each thing; the first one's label is the answer, the others' are shuffled."""
    rest = [label for label in LABELS if label != answer]
    labels = [answer, *(rest[int(i)] for i in rng.permutation(len(rest)))]
    return tuple((label, thing.x_px, thing.y_px) for label, thing in zip(labels, things, strict=True))


def semantic_correspondence(rng: np.random.Generator, answer: str) -> Example:
    """The same part of another creature: other colours and size, turned, mirrored (SPair-71k).

    Front and back leg look the same; which is which is told by the head.
    """
    part = str(rng.choice(CREATURE_PARTS))
    one, two = _creature(rng), _creature(rng)
    return _same_part(rng, one, two, part, [p for p in CREATURE_PARTS if p != part], answer)


def _creature(rng: np.random.Generator) -> dict[str, Thing]:
    turns, mirror, scale = int(rng.integers(4)), int(rng.choice([-1, 1])), float(rng.uniform(0.85, 1.05))
    middle = [IMAGE_PX / 2 + float(rng.uniform(-1.5, 1.5)) for _ in range(2)]
    parts = {}
    for part, shape, dx, dy, radius in CREATURE:
        x, y = turned(mirror * dx * scale, (dy - 2) * scale, turns)
        color = str(rng.choice(list(COLORS)))
        parts[part] = Thing(shape, color, middle[0] + x, middle[1] + y, radius * scale, turns)
    return parts


def functional_correspondence(rng: np.random.Generator, answer: str) -> Example:
    """The part of another kind of tool that serves the same purpose (FunKPoint): form follows function, not place."""
    kinds = [str(kind) for kind in rng.permutation(list(_TOOLS))[:2]]
    function = str(rng.choice(list(FORMS)))
    variants = {name: rng.permutation(2) for name in FORMS}
    one, two = (_tool(rng, kind, {n: FORMS[n][int(v[i])] for n, v in variants.items()}) for i, kind in enumerate(kinds))
    return _same_part(rng, one, two, function, [f for f in FORMS if f != function], answer)


def _tool(rng: np.random.Generator, kind: str, forms: dict[str, str]) -> dict[str, Thing]:
    """A tool of one colour with its four functions in any order."""
    turns, color = int(rng.integers(4)), str(rng.choice(list(COLORS)))
    middle = [IMAGE_PX / 2 + float(rng.uniform(-1.5, 1.5)) for _ in range(2)]
    order = [list(forms)[int(i)] for i in rng.permutation(len(forms))]
    parts = {}
    for function, (dx, dy) in zip(order, _TOOLS[kind], strict=True):
        x, y = turned(dx, dy, turns)
        part_turns = int(rng.integers(4))
        parts[function] = Thing(forms[function], color, middle[0] + x, middle[1] + y, 5.6, part_turns)
    return parts


def _same_part(
    rng: np.random.Generator, one: dict[str, Thing], two: dict[str, Thing], part: str, others: list[str], answer: str
) -> Example:
    first: Picture = new_picture(list(one.values()), rng)
    second = new_picture(list(two.values()), rng)
    points = _labelled(rng, [two[part], *(two[other] for other in others)], answer)
    reference = ((REFERENCE, one[part].x_px, one[part].y_px),)
    return Example((replace(first, points=reference), replace(second, points=points)), _QUESTION, answer)
