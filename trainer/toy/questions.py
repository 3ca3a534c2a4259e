"""Questions about toy scenes: each is a program in the vocabulary of CLEVR, and the program gives the answer.

Kinds follow CLEVR (query, count, exist, compare, relate), TallyQA (simple and complex counts) and GQA
(attributes, positions).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainer.toy.world import COLORS, COLUMNS, GRID, ROWS, SHAPES, ToyObject, ToyScene

KINDS = ("query", "exist", "count_simple", "count_complex", "compare", "relate", "attribute", "position")
Step = tuple[str, list[int], list[str]]
"""One step of a program: function, indices of the steps it reads, constants."""


@dataclass(frozen=True, slots=True)
class ToyQuestion:
    """A question with its program and answer; `template` is what answers are balanced within."""

    kind: str
    template: str
    text: str
    program: tuple[Step, ...]
    answer: str


class NoAnswerError(Exception):
    """The question does not apply to the scene (`unique` found none or several objects)."""


def cell_name(row: int, column: int) -> str:
    """Words for a cell: 'top left', 'middle center'."""
    return f"{ROWS[row]} {COLUMNS[column]}"


def execute(program: tuple[Step, ...], scene: ToyScene) -> str:
    """The answer of a program. Raises NoAnswerError if it does not apply to the scene."""
    values: list[Any] = []
    for function, inputs, constants in program:
        values.append(_apply(function, [values[i] for i in inputs], constants, scene))
    answer = values[-1]
    return ("yes" if answer else "no") if isinstance(answer, bool) else str(answer)


def _apply(function: str, inputs: list[Any], constants: list[str], scene: ToyScene) -> Any:
    name, _, attribute = function.partition("_")
    if function == "scene":
        return list(scene.objects)
    if name == "filter":
        return [o for o in inputs[0] if _attribute(o, attribute) == constants[0]]
    if function == "unique":
        if len(inputs[0]) != 1:
            raise NoAnswerError
        return inputs[0][0]
    if function == "relate":
        return [o for o in scene.objects if _stands(o, constants[0], inputs[0])]
    if function == "count":
        return len(inputs[0])
    if function == "exist":
        return bool(inputs[0])
    if name == "query":
        return _attribute(inputs[0], attribute)
    if name == "verify":
        return _attribute(inputs[0], attribute) == constants[0]
    if function == "name":
        return f"{inputs[0][0].color} {inputs[0][0].shape}" if inputs[0] else "nothing"
    if function == "greater_than":
        return inputs[0] > inputs[1]
    if function == "less_than":
        return inputs[0] < inputs[1]
    raise ValueError(f"unknown function {function!r} in a question program")


def _attribute(o: ToyObject, attribute: str) -> str:
    if attribute == "row":
        return ROWS[o.row]
    if attribute == "column":
        return COLUMNS[o.column]
    if attribute == "position":
        return cell_name(o.row, o.column)
    value: str = getattr(o, attribute)
    return value


def _stands(o: ToyObject, relation: str, other: ToyObject) -> bool:
    if relation in ("left", "right"):
        return o.column < other.column if relation == "left" else o.column > other.column
    return o.row < other.row if relation == "above" else o.row > other.row


class _Program:
    """Builds the steps of a program one after the other."""

    def __init__(self) -> None:
        self.steps: list[Step] = [("scene", [], [])]

    def add(self, function: str, *constants: str, inputs: list[int] | None = None) -> _Program:
        self.steps.append((function, [len(self.steps) - 1] if inputs is None else inputs, list(constants)))
        return self

    def select(self, color: str | None = None, shape: str | None = None) -> _Program:
        """Start again from the scene and filter it."""
        start = 0
        for attribute, value in (("color", color), ("shape", shape)):
            if value:
                self.add(f"filter_{attribute}", value, inputs=[start])
                start = len(self.steps) - 1
        return self


Draft = tuple[str, str, str, tuple[Step, ...]]
"""Kind, template, text and program of a question that may or may not apply to a scene."""

_RELATION_WORDS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


def all_questions(scene: ToyScene) -> list[ToyQuestion]:
    """Every question of every template that applies to the scene."""
    questions = []
    for kind, template, text, program in itertools.chain(_fixed_drafts(), _scene_drafts(scene)):
        try:
            questions.append(ToyQuestion(kind, template, text, program, execute(program, scene)))
        except NoAnswerError:
            continue
    return questions


@functools.cache
def _fixed_drafts() -> tuple[Draft, ...]:
    """Questions whose text does not depend on the scene."""
    drafts = itertools.chain(_about_shapes(), _about_colors(), _counts(), _comparisons(), _about_cells())
    return tuple((kind, template, text, tuple(program.steps)) for kind, template, text, program in drafts)


def _scene_drafts(scene: ToyScene) -> Iterator[Draft]:
    """Questions that name things of the scene: where they are and how they stand to each other."""
    for o in scene.objects:
        name = f"{o.color} {o.shape}"
        where = _the(o.color, o.shape).add("query_position")
        yield "position", "where", f"where is the {name}?", tuple(where.steps)
        for relation, words in _RELATION_WORDS.items():
            related = _the(o.color, o.shape).add("relate", relation).add("unique").add("query_color")
            text = f"what color is the thing {words} the {name}?"
            yield "relate", f"color_{relation}", text, tuple(related.steps)
    for o, other in itertools.permutations(scene.objects, 2):
        for relation, words in _RELATION_WORDS.items():
            text = f"is the {o.color} {o.shape} {words} the {other.color} {other.shape}?"
            yield "relate", f"is_{relation}", text, tuple(_is_related(o, relation, other).steps)


UnfinishedDraft = tuple[str, str, str, _Program]


def _the(color: str | None = None, shape: str | None = None) -> _Program:
    """The one thing of this colour and shape."""
    return _Program().select(color, shape).add("unique")


def _is_related(o: ToyObject, relation: str, other: ToyObject) -> _Program:
    """Both are unique; is `o` among the things that stand so to `other`?"""
    program = _the(o.color, o.shape).select(other.color, other.shape).add("unique")
    return program.add("relate", relation).add("filter_color", o.color).add("filter_shape", o.shape).add("exist")


def _about_shapes() -> Iterator[UnfinishedDraft]:
    for shape in SHAPES:
        yield "query", "query_color", f"what color is the {shape}?", _the(shape=shape).add("query_color")
        yield "exist", "exist_shape", f"is there a {shape}?", _Program().select(shape=shape).add("exist")
        for color in COLORS:
            is_color = _the(shape=shape).add("verify_color", color)
            yield "attribute", "is_color", f"is the {shape} {color}?", is_color
            exists = _Program().select(color, shape).add("exist")
            yield "exist", "exist_color_shape", f"is there a {color} {shape}?", exists


def _about_colors() -> Iterator[UnfinishedDraft]:
    for color in COLORS:
        yield "query", "query_shape", f"what shape is the {color} thing?", _the(color).add("query_shape")
        yield "exist", "exist_color", f"is there a {color} thing?", _Program().select(color).add("exist")
        for shape in SHAPES:
            is_shape = _the(color).add("verify_shape", shape)
            yield "attribute", "is_shape", f"is the {color} thing a {shape}?", is_shape


def _counts() -> Iterator[UnfinishedDraft]:
    yield "count_simple", "count_all", "how many things are there?", _Program().select().add("count")
    for shape in SHAPES:
        count = _Program().select(shape=shape).add("count")
        yield "count_simple", "count_shape", f"how many {shape}s are there?", count
    for color in COLORS:
        count = _Program().select(color).add("count")
        yield "count_simple", "count_color", f"how many {color} things are there?", count
        for shape in SHAPES:
            count = _Program().select(color, shape).add("count")
            yield "count_complex", "count_color_shape", f"how many {color} {shape}s are there?", count
    for attribute, names in (("row", ROWS), ("column", COLUMNS)):
        for name in names:
            line = f"in the {name} {attribute}"
            count = _Program().add(f"filter_{attribute}", name).add("count")
            yield "count_complex", "count_line", f"how many things are {line}?", count
            for color in COLORS:
                count = _Program().select(color).add(f"filter_{attribute}", name).add("count")
                yield "count_complex", "count_color_line", f"how many {color} things are {line}?", count


def _comparisons() -> Iterator[UnfinishedDraft]:
    groups: dict[str, tuple[str, ...]] = {"shape": SHAPES, "color": tuple(COLORS)}
    for attribute, names in groups.items():
        for one, two in itertools.permutations(names, 2):
            for function, word in (("greater_than", "more"), ("less_than", "fewer")):
                program = _Program().select(**{attribute: one}).add("count")
                first = len(program.steps) - 1
                program.select(**{attribute: two}).add("count")
                program.add(function, inputs=[first, len(program.steps) - 1])
                nouns = [f"{n}s" if attribute == "shape" else f"{n} things" for n in (one, two)]
                text = f"are there {word} {nouns[0]} than {nouns[1]}?"
                yield "compare", f"compare_{attribute}", text, program


def _about_cells() -> Iterator[UnfinishedDraft]:
    for row, column in itertools.product(range(GRID), repeat=2):
        at = _Program().add("filter_row", ROWS[row]).add("filter_column", COLUMNS[column])
        yield "position", "what_at", f"what is in the {cell_name(row, column)}?", at.add("name")
