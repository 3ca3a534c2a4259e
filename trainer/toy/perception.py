"""What toy model E learns before any task: to see several images, marked points, boxes, parts and styles.

Records of one to three pictures with questions about each of them and about two at once. None of the nine tasks is
among them: things stand on the grid or lie scattered, parts are never put together, nothing is matched by a point.
"""

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from trainer.data.records import KindQuestion, Record
from trainer.toy.questions import cell_name
from trainer.toy.tasks.one_image import MAX_COUNT
from trainer.toy.tasks.pictures import (
    CELLS,
    GRAY,
    LABELS,
    REFERENCE,
    Picture,
    Style,
    Thing,
    draw,
    in_cell,
    new_picture,
    sample_cells,
    sample_thing,
)
from trainer.toy.tasks.whole_images import QUADRANT, STYLES
from trainer.toy.world import CELL_PX, COLORS, IMAGE_PX, SHAPES

ORDINALS = ("first", "second", "third")
ALL_PARTS = (*SHAPES, "bar", "rails", "wedge", "ring", "frame")
BRIGHTNESS = ((0.5, "dark"), (0.7, "gray"), (np.inf, "pale"))
"""Upper bound of the reflectance that a word stands for."""
_FINE_GRID = 4
_FEW_CHANGES = 3
_MOST_PER_KIND = 3


@dataclass(frozen=True, slots=True)
class MemoryImage:
    """An image that is kept in memory."""

    data: bytes

    def read(self) -> bytes:
        """The encoded image."""
        return self.data

    def __str__(self) -> str:
        return "an image in memory"


def perception_records(n: int, seed: int, progress: Callable[[], None] | None = None) -> list[Record]:
    """N records with their images in memory; `progress` is called after each."""
    records = []
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        pictures, questions = sample_perception(rng)
        images = []
        for picture in pictures:
            buffer = io.BytesIO()
            draw(picture, rng).save(buffer, "PNG", compress_level=1)
            images.append(MemoryImage(buffer.getvalue()))
        records.append(Record(f"perception/{i:06d}", "perception", tuple(images), tuple(questions)))
        if progress is not None:
            progress()
    return records


def sample_perception(rng: np.random.Generator) -> tuple[list[Picture], list[KindQuestion]]:
    """One to three pictures of one sort, and a few questions of every kind that they allow, each text once.

    Of scenes on the grid the second and third are often variants of the first, or the same things in other places.
    """
    sort = str(rng.choice(list(_SORTS), p=[share for _, share in _SORTS.values()]))
    sample, _ = _SORTS[sort]
    pictures = [sample(rng) for _ in range(int(rng.integers(1, len(ORDINALS) + 1)))]
    if sort == "grid":
        pictures[1:] = [_another(rng, pictures[0]) for _ in pictures[1:]]
    questions = list({question.text: question for question in _questions(rng, sort, pictures)}.values())
    kept: Counter[str] = Counter()
    few = []
    for question in (questions[int(i)] for i in rng.permutation(len(questions))):
        if kept[question.kind] < _MOST_PER_KIND:
            kept[question.kind] += 1
            few.append(question)
    return (pictures, few) if few else sample_perception(rng)


def _grid_scene(rng: np.random.Generator) -> Picture:
    things = [in_cell(rng, *cell, jitter_px=2.5) for cell in sample_cells(rng, int(rng.integers(2, 9)))]
    style = STYLES[int(rng.integers(len(STYLES)))] if rng.random() < 0.6 else Style()
    return _with_extras(rng, new_picture(things, rng, style))


def _with_extras(rng: np.random.Generator, picture: Picture) -> Picture:
    """Points, boxes, or a covered part; often none."""
    extra = rng.choice(["points", "boxes", "window", "hidden", "none"], p=[0.5, 0.15, 0.07, 0.07, 0.21])
    order = [picture.things[int(i)] for i in rng.permutation(len(picture.things))]
    if extra == "points":
        labels = [REFERENCE] if rng.random() < 0.4 else [str(label) for label in rng.permutation(list(LABELS))]
        marked = zip(labels, order, strict=False)
        return replace(picture, points=tuple((label, t.x_px, t.y_px) for label, t in marked))
    if extra == "boxes":
        boxes = []
        for label, thing in zip("ab", order, strict=False):
            half = thing.radius_px * float(rng.uniform(0.9, 1.6))
            x, y = (place + float(rng.uniform(-2, 2)) for place in (thing.x_px, thing.y_px))
            boxes.append((label, (x - half, y - half, x + half, y + half)))
        return replace(picture, boxes=tuple(boxes))
    if extra == "window":
        return replace(picture, window=QUADRANT)
    return replace(picture, hidden=QUADRANT) if extra == "hidden" else picture


def _another(rng: np.random.Generator, first: Picture) -> Picture:
    """A variant of the first scene, its things in other places, or another scene; under another light."""
    how = rng.choice(["variant", "moved", "new"], p=[0.45, 0.3, 0.25])
    if how == "new":
        return _grid_scene(rng)
    if how == "moved":
        things = [
            replace(in_cell(rng, *cell), shape=thing.shape, color=thing.color)
            for cell, thing in zip(sample_cells(rng, len(first.things)), first.things, strict=True)
        ]
    else:
        share = float(rng.choice([0.0, 0.0, 0.1, 0.25, 0.4]))
        kept = [_exchanged(rng, cell) if rng.random() < share else _at(first, cell) for cell in CELLS]
        things = [thing for thing in kept if thing is not None]
    return _with_extras(rng, new_picture(things, rng, first.style))


def _exchanged(rng: np.random.Generator, cell: tuple[int, int]) -> Thing | None:
    return in_cell(rng, *cell) if rng.random() < 0.7 else None


def _scattered(rng: np.random.Generator) -> Picture:
    """Few colours and shapes, so that there is something to count."""
    colors = rng.permutation(list(COLORS))[: int(rng.integers(1, 4))]
    things = []
    for cell in rng.permutation(_FINE_GRID**2)[: int(rng.integers(1, 12))]:
        row, column = divmod(int(cell), _FINE_GRID)
        x, y = (IMAGE_PX / _FINE_GRID * (i + 0.5) + float(rng.uniform(-1.5, 1.5)) for i in (column, row))
        things.append(replace(sample_thing(rng, x, y, float(rng.uniform(3, 4.4))), color=str(rng.choice(colors))))
    return new_picture(things, rng)


def _loose_parts(rng: np.random.Generator) -> Picture:
    things = [
        replace(in_cell(rng, *cell, jitter_px=3), shape=str(rng.choice(ALL_PARTS)), turns=int(rng.integers(4)))
        for cell in sample_cells(rng, int(rng.integers(4, 7)))
    ]
    return _marked(rng, new_picture(things, rng))


def _gray_scene(rng: np.random.Generator) -> Picture:
    things = [
        replace(in_cell(rng, *cell), color=GRAY, radius_px=6.0, reflectance=float(rng.uniform(0.35, 0.95)))
        for cell in sample_cells(rng, int(rng.integers(4, 7)))
    ]
    light = [1.05, float(rng.uniform(0.5, 1.0))]
    picture = new_picture(things, rng, Style(outline="black"))
    left, right = (light[int(i)] for i in rng.permutation(2))
    return _marked(rng, replace(picture, light=(left, right)))


def _marked(rng: np.random.Generator, picture: Picture) -> Picture:
    labels = [str(label) for label in rng.permutation([*LABELS])] if rng.random() < 0.7 else [REFERENCE]
    marked = zip(labels, picture.things, strict=False)
    return replace(picture, points=tuple((label, t.x_px, t.y_px) for label, t in marked))


_SORTS = {
    "grid": (_grid_scene, 0.6),
    "scattered": (_scattered, 0.15),
    "parts": (_loose_parts, 0.15),
    "gray": (_gray_scene, 0.1),
}
"""How each sort of picture is sampled, and how often."""


def _questions(rng: np.random.Generator, sort: str, pictures: list[Picture]) -> Iterator[KindQuestion]:
    for ordinal, picture in zip(ORDINALS, pictures, strict=False):
        image = f"the {ordinal} image"
        if not _whole(picture):
            yield from _colors(rng, picture, image)
        elif sort in ("grid", "gray"):
            yield from _cells(rng, picture, image)
        if sort == "grid" and _whole(picture):
            style = picture.style
            yield KindQuestion("style", f"what style has {image}?", f"{style.palette} {style.texture} {style.outline}")
        yield from _points_and_boxes(picture, image)
        if sort in ("grid", "scattered") and _whole(picture):
            yield from _counts(rng, picture, image)
    if sort == "grid":
        yield from _comparisons(rng, pictures)


def _whole(picture: Picture) -> bool:
    return picture.window is None and picture.hidden is None


def _at(picture: Picture, cell: tuple[int, int]) -> Thing | None:
    return next((t for t in picture.things if _cell(t) == cell), None)


def _cell(thing: Thing) -> tuple[int, int]:
    return int(thing.y_px // CELL_PX), int(thing.x_px // CELL_PX)


def _name(thing: Thing | None) -> str:
    if thing is None:
        return "nothing"
    if thing.color == GRAY:
        return f"{next(word for bound, word in BRIGHTNESS if thing.reflectance < bound)} {thing.shape}"
    return thing.name


def _cells(rng: np.random.Generator, picture: Picture, image: str) -> Iterator[KindQuestion]:
    for cell in (*[_cell(t) for t in picture.things], *sample_cells(rng, 1)):
        yield KindQuestion("cell", f"what is in the {cell_name(*cell)} of {image}?", _name(_at(picture, cell)))


def _colors(rng: np.random.Generator, picture: Picture, image: str) -> Iterator[KindQuestion]:
    """Of things that a covered part leaves at least a quarter of."""
    shown = [(1, 1), (1, 2), (2, 1), (2, 2)]
    if picture.hidden is not None:
        shown = [cell for cell in CELLS if cell != (2, 2)]
    for i in rng.permutation(len(shown))[:4]:
        thing = _at(picture, shown[int(i)])
        yield KindQuestion(
            "covered",
            f"what color is in the {cell_name(*shown[int(i)])} of {image}?",
            thing.color if thing else "nothing",
        )


def _points_and_boxes(picture: Picture, image: str) -> Iterator[KindQuestion]:
    """From a label to what is there and back."""
    marked = {label: next(t for t in picture.things if (t.x_px, t.y_px) == (x, y)) for label, x, y in picture.points}
    for label, thing in marked.items():
        point = "the point" if label == REFERENCE else f"point {label}"
        yield KindQuestion("point", f"what is at {point} of {image}?", _name(thing))
        yield KindQuestion("where", f"where is {point} of {image}?", cell_name(*_cell(thing)))
    if REFERENCE not in marked:
        for label, thing in _with_own_name(marked):
            yield KindQuestion("label", f"which point of {image} is at the {_name(thing)}?", label)
        for label, thing in marked.items():
            yield KindQuestion("label", f"which point of {image} is in the {cell_name(*_cell(thing))}?", label)
    boxed = {}
    for label, (left, top, right, bottom) in picture.boxes:
        x, y = (left + right) / 2, (top + bottom) / 2
        boxed[label] = min(picture.things, key=lambda t: (t.x_px - x) ** 2 + (t.y_px - y) ** 2)
        yield KindQuestion("box", f"what is in box {label} of {image}?", _name(boxed[label]))
    for label, thing in _with_own_name(boxed):
        yield KindQuestion("label", f"which box of {image} has the {_name(thing)}?", label)


def _with_own_name(labelled: dict[str, Thing]) -> list[tuple[str, Thing]]:
    """Those that share their name with no other labelled thing."""
    names = [_name(thing) for thing in labelled.values()]
    return [(label, thing) for label, thing in labelled.items() if names.count(_name(thing)) == 1]


def _counts(rng: np.random.Generator, picture: Picture, image: str) -> Iterator[KindQuestion]:
    for _ in range(2):
        color = str(rng.choice(list(COLORS))) if rng.random() < 0.6 else None
        shape = str(rng.choice(SHAPES)) if color is None or rng.random() < 0.4 else None
        n = sum(color in (None, t.color) and shape in (None, t.shape) for t in picture.things)
        if n <= MAX_COUNT and (n > 0 or rng.random() < 0.3):
            noun = f"{shape}s" if shape else "things"
            yield KindQuestion("count", f"how many {f'{color} ' if color else ''}{noun} has {image}?", str(n))


def _comparisons(rng: np.random.Generator, pictures: list[Picture]) -> Iterator[KindQuestion]:
    """About two images at once: is a cell the same, and which image has something that the others lack."""
    whole = [(ordinal, picture) for ordinal, picture in zip(ORDINALS, pictures, strict=False) if _whole(picture)]
    for (one, first), (two, second) in itertools.combinations(whole, 2):
        by_answer: dict[str, list[tuple[int, int]]] = {"yes": [], "no": []}
        for cell in CELLS:
            here, there = _name(_at(first, cell)), _name(_at(second, cell))
            if (here, there) != ("nothing", "nothing"):
                by_answer["yes" if here == there else "no"].append(cell)
        n = min(2, *(len(cells) for cells in by_answer.values()))
        n_other = len(by_answer["no"])
        if n_other <= _FEW_CHANGES:
            yield KindQuestion("alike", f"is the {two} image the same as the {one}?", "no" if n_other else "yes")
        if n_other <= MAX_COUNT:
            yield KindQuestion("differ", f"how many things of the {two} image are not as in the {one}?", str(n_other))
        for answer, cells in by_answer.items():
            for i in rng.permutation(len(cells))[:n]:
                place = cell_name(*cells[int(i)])
                yield KindQuestion("same", f"has the {two} image the same in the {place} as the {one}?", answer)
        yield from _matches(first, one, second, two)
        yield from _matches(second, two, first, one)
    if len(whole) == len(ORDINALS):
        alike = [ordinal for ordinal, picture in whole[1:] if _names(picture) == _names(pictures[0])]
        if len(alike) == 1:
            yield KindQuestion("alike", "which image is the same as the first?", alike[0])
    if len(whole) == len(pictures) > 1:
        names = [{t.name for t in p.things} for p in pictures]
        for i, ordinal in enumerate(ORDINALS[: len(pictures)]):
            own = sorted(names[i].difference(*(names[:i] + names[i + 1 :])))
            if own:
                yield KindQuestion("which", f"which image has a {rng.choice(own)}?", ordinal)


def _names(picture: Picture) -> list[str]:
    """What is in each cell."""
    return [_name(_at(picture, cell)) for cell in CELLS]


def _matches(picture: Picture, ordinal: str, other: Picture, other_ordinal: str) -> Iterator[KindQuestion]:
    """Where the other image has what a point marks in this one, if it has it once."""
    for label, x, y in picture.points:
        thing = next(t for t in picture.things if (t.x_px, t.y_px) == (x, y))
        there = [t for t in other.things if t.name == thing.name]
        if len(there) == 1:
            point = "the point" if label == REFERENCE else f"point {label}"
            text = f"where in the {other_ordinal} image is the thing at {point} of the {ordinal}?"
            yield KindQuestion("match", text, cell_name(*_cell(there[0])))
