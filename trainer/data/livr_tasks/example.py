"""What a task builder gives: pictures, a question with its options, the right one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

LETTERS = "ABCD"


@dataclass(frozen=True, slots=True)
class Example:
    """One question about one to three pictures.

    sources: the raw images that it was made from; no raw image may be in two splits. originals: those among `pictures`'
    raw images, before anything was drawn on them, that are compared with a test set's.
    """

    pictures: tuple[Image.Image, ...]
    question: str
    answer: str
    sources: tuple[str, ...]
    originals: tuple[Image.Image, ...]


Builder = Callable[[Path, np.random.Generator], Iterator[Example]]
"""From a raw folder, examples in a random order, without end or until the raw data is used up. Raises DataError."""


def multiple_choice(question: str, options: Sequence[str]) -> str:
    """The question with its options, one a line, as BLINK lays them out."""
    lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines])


def place_of_answer(n_options: int, rng: np.random.Generator) -> tuple[int, str]:
    """Where the right option goes, uniformly, and the answer that this makes."""
    place = int(rng.integers(n_options))
    return place, f"({LETTERS[place]})"
