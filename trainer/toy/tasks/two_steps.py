"""Toy tasks with an auxiliary image, which shows the thing that is asked about alone: named, or two steps away."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from trainer.toy.tasks.example import Example, Hint
from trainer.toy.tasks.pictures import CELLS, in_cell, new_picture
from trainer.toy.world import COLORS, GRID

STEPS = {"above": (-1, 0), "below": (1, 0), "left of": (0, -1), "right of": (0, 1)}
"""Rows and columns from a thing to the one that is meant."""
_MOST_OTHERS = 3


def two_steps(rng: np.random.Generator, answer: str) -> Example:
    """Which shape has the thing next to the thing next to the named one? Its name is the only one of its kind.

    The hint is the same picture without all other things.
    """
    first, second = _turn(rng)
    starts = [cell for cell in CELLS if all(_in_grid(moved) for moved in _path(cell, first, second))]
    start = starts[int(rng.integers(len(starts)))]
    chain = _path(start, first, second)
    others = [cell for cell in CELLS if cell not in chain]
    cells = [*chain, *(others[int(i)] for i in rng.permutation(len(others))[: rng.integers(0, _MOST_OTHERS + 1)])]
    named, passed, target, *rest = (in_cell(rng, *cell) for cell in cells)
    target = replace(target, shape=answer)
    while named.name in [thing.name for thing in (passed, target, *rest)]:
        named = in_cell(rng, *start)
    picture = new_picture([named, passed, target, *rest], rng)
    question = f"what shape is the thing {second} the thing {first} the {named.name}?"
    return Example((picture,), question, answer, Hint(replace(picture, things=(target,)), f"a {target.name}"))


def named_shape(rng: np.random.Generator, answer: str) -> Example:
    """Which shape has the thing of the named colour? The toy models know; a method may spare itself the latents."""
    cells = [CELLS[int(i)] for i in rng.permutation(len(CELLS))[: 3 + rng.integers(0, _MOST_OTHERS + 1)]]
    target, *rest = (in_cell(rng, *cell) for cell in cells)
    target = replace(target, shape=answer)
    colors = [color for color in COLORS if color != target.color]
    rest = [replace(thing, color=colors[rng.integers(len(colors))]) for thing in rest]
    picture = new_picture([target, *rest], rng)
    hint = Hint(replace(picture, things=(target,)), f"a {target.name}")
    return Example((picture,), f"what shape is the {target.color} thing?", answer, hint)


def _turn(rng: np.random.Generator) -> tuple[str, str]:
    """Two steps, one along a row and one along a column, in any order."""
    vertical, horizontal = ("above", "below")[rng.integers(2)], ("left of", "right of")[rng.integers(2)]
    return (vertical, horizontal) if rng.random() < 0.5 else (horizontal, vertical)


def _path(cell: tuple[int, int], *steps: str) -> list[tuple[int, int]]:
    """The cell, and where each step leads."""
    path = [cell]
    for step in steps:
        rows, columns = STEPS[step]
        path.append((path[-1][0] + rows, path[-1][1] + columns))
    return path


def _in_grid(cell: tuple[int, int]) -> bool:
    return all(0 <= i < GRID for i in cell)
