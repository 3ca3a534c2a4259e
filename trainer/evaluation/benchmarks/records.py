"""The one record type that every benchmark gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any, Literal

from trainer.data.records import ImageSource

LETTERS = ascii_uppercase

AnswerKind = Literal["letter", "yes_no", "integer", "float", "list", "text", "directions", "maze_plan", "block_plan"]
"""How an answer is written, extracted and compared."""

_INSTRUCTIONS: dict[AnswerKind, str] = {
    "letter": "Answer with the letter of the right option.",
    "yes_no": "Answer yes or no.",
    "integer": "Answer with an integer.",
    "float": "Answer with a number.",
    "list": "Answer with a list in square brackets.",
    "text": "Answer with a single word or phrase.",
    "directions": "Answer with one or two of above, below, left, right, separated by a comma.",
    "maze_plan": "Answer with the moves L, R, U, D, separated by commas.",
    "block_plan": "Answer with one move(block,target) per line; the target is a block or the table.",
}


@dataclass(frozen=True, slots=True)
class BenchmarkRecord:
    """One question about one or more images.

    question: complete, lettered options included; `prompt` adds how to answer.
    choices: the texts of the options, or the possible answers; empty if any answer may be given.
    answer: the right one: a letter for `letter`, else text.
    group: records that are scored together (a pair, a cycle, a chain of steps).
    details: what the metric needs besides.
    """

    record_id: str
    images: tuple[ImageSource, ...]
    question: str
    choices: tuple[str, ...]
    answer: str
    answer_kind: AnswerKind
    group: str = ""
    category: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The question and one line that says how to answer."""
        return f"{self.question}\n{_INSTRUCTIONS[self.answer_kind]}"

    @property
    def candidates(self) -> tuple[str, ...]:
        """The answers whose likelihoods are compared: letters of options, or the choices; empty without choices."""
        return tuple(LETTERS[: len(self.choices)]) if self.answer_kind == "letter" else self.choices
