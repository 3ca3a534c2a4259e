"""Which images and questions a step sees: a pure function of seed and step, so a resumed run needs no state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from shared.errors import DataError
from trainer.data.records import KindQuestion, Record


@dataclass(frozen=True, slots=True)
class Batch:
    """B records and the questions drawn for each of them."""

    records: list[Record]
    questions: list[list[KindQuestion]]


class Sampler:
    """Every image once per epoch in a shuffled order; K_q of its questions without replacement.

    An image with fewer than K_q questions is asked all of them.
    """

    def __init__(self, records: Sequence[Record], batch_images: int, questions_per_image: int, seed: int):
        if len(records) < batch_images:
            raise DataError(
                f"{len(records)} training images for train.batch_images: {batch_images}; lower it or add images"
            )
        self._records = records
        self._batch_images = batch_images
        self._questions_per_image = questions_per_image
        self._seed = seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def batch(self, step: int) -> Batch:
        """The batch of one step."""
        first = step * self._batch_images
        records = [self._records[self._index(first + i)] for i in range(self._batch_images)]
        rng = np.random.default_rng([self._seed, 1, step])
        questions = []
        for record in records:
            drawn = rng.permutation(len(record.questions))[: self._questions_per_image]
            questions.append([record.questions[i] for i in drawn])
        return Batch(records, questions)

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self._records))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self._seed, 0, epoch]).permutation(len(self._records)))
        return int(self._order[1][place])


def without_kinds(records: Sequence[Record], kinds: Sequence[str]) -> list[Record]:
    """Records without the questions of these kinds; records left with none are dropped."""
    kept = [replace(r, questions=tuple(q for q in r.questions if q.kind not in kinds)) for r in records]
    return [record for record in kept if record.questions]


def derangement(n: int, seed: int) -> np.ndarray:
    """A random permutation of 0 … n−1 in one cycle, so that nothing stays in its place (n ≥ 2)."""
    order = np.random.default_rng([seed, 2]).permutation(n)
    target = np.empty(n, dtype=np.int64)
    target[order] = np.roll(order, 1)
    return target


def shuffled_pairs(records: Sequence[Record], seed: int) -> list[Record]:
    """The control: every image gets the questions of another one."""
    sources = derangement(len(records), seed)
    return [replace(r, questions=records[int(i)].questions) for r, i in zip(records, sources, strict=True)]
