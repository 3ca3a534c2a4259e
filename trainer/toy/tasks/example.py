"""What a task makes: pictures, a question about all of them, and its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trainer.toy.tasks.pictures import Picture


@dataclass(frozen=True, slots=True)
class Hint:
    """A picture that shows the answer more plainly, and what it shows in words: the record's auxiliary image."""

    picture: Picture
    description: str


@dataclass(frozen=True, slots=True)
class Example:
    """A question about one or more pictures; the answer follows from the pictures alone."""

    pictures: tuple[Picture, ...]
    question: str
    answer: str
    hint: Hint | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of question. make: `rng, answer → Example` with this answer, one of `answers`.

    The answer is given rather than drawn, so that a data set holds every answer as often as any other; nothing of the
    question may depend on it.
    """

    name: str
    answers: tuple[str, ...]
    make: Callable[[np.random.Generator, str], Example]
