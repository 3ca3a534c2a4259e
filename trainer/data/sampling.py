"""Which images and questions a step sees: a pure function of seed and step, so a resumed run needs no state."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shared.config import CurriculumConfig
from shared.errors import DataError
from trainer.data.curriculum import Curriculum, several_kinds_first
from trainer.data.records import KindQuestion, Record
from trainer.data.spans import counted

_ORDER, _QUESTIONS, _PAIRS, _GATE, _SOURCES = range(5)
"""Streams of random numbers, one for each use."""
_BLOCK = 1000


@dataclass(frozen=True, slots=True)
class Batch:
    """B records and the questions drawn for each of them."""

    records: list[Record]
    questions: list[list[KindQuestion]]


@dataclass(frozen=True, slots=True)
class Part:
    """A further source of a mixture. weight: how many of its images are drawn for each one of the main source."""

    records: Sequence[Record]
    weight: float


class Sampler:
    """Every image of a source once per epoch in a shuffled order; K_q of its questions, several kinds first.

    The curriculum decides which questions may be drawn, the first K_q of a random order of them are asked: one of each
    kind, then a second one of each. None is asked twice, so an image with fewer than K_q is asked all that it has.
    A mixture draws from its sources in proportion to their weights, exactly so in every thousand images.

    Nothing depends on the steps before: a resumed run needs no state, and any thread may ask for any step.
    """

    def __init__(
        self,
        records: Sequence[Record],
        batch_images: int,
        questions_per_image: int,
        seed: int,
        curriculum: Curriculum | None = None,
        others: Sequence[Part] = (),
    ):
        self._parts = [Part(records, 1.0), *others]
        n_images = sum(len(part.records) for part in self._parts)
        if n_images < batch_images:
            raise DataError(
                f"{n_images} training images for train.batch_images: {batch_images}; lower it or add images"
            )
        self._batch_images = batch_images
        self._questions_per_image = questions_per_image
        self._seed = seed
        self._curriculum = curriculum or Curriculum(CurriculumConfig())
        self._counts = shares_of_block([part.weight for part in self._parts])
        # Loader threads ask for steps of neighbouring epochs at the same time.
        self._order = lru_cache(2 * len(self._parts))(self._shuffled)
        self._block = lru_cache(2)(self._drawn_sources)

    def batch(self, step: int) -> Batch:
        """The batch of one step."""
        first = step * self._batch_images
        records = [self._record(first + i) for i in range(self._batch_images)]
        rng, gate = (np.random.default_rng([self._seed, stream, step]) for stream in (_QUESTIONS, _GATE))
        questions = []
        for record in records:
            order = rng.permutation(len(record.questions))
            open_ = self._curriculum.let_through(record, step, gate)
            drawn = several_kinds_first([record.questions[i] for i in order if open_[i]])
            questions.append(drawn[: self._questions_per_image])
        return Batch(records, questions)

    def metrics(self, step: int, batches: Sequence[Batch]) -> dict[str, float]:
        """What the curriculum did in a step, whose batch may have come in parts."""
        records = [record for batch in batches for record in batch.records]
        return self._curriculum.metrics(step, records, [asked for batch in batches for asked in batch.questions])

    def _record(self, position: int) -> Record:
        """The image at a position of the endless order of all sources."""
        block, place = divmod(position, _BLOCK)
        sources = self._block(block)
        source = int(sources[place])
        before = block * self._counts[source] + int(np.count_nonzero(sources[:place] == source))
        epoch, place = divmod(before, len(self._parts[source].records))
        return self._parts[source].records[int(self._order(source, epoch)[place])]

    def _drawn_sources(self, block: int) -> np.ndarray:
        """The source of every image of a block."""
        sources = np.repeat(np.arange(len(self._counts)), self._counts)
        return np.random.default_rng([self._seed, _SOURCES, block]).permutation(sources)

    def _shuffled(self, source: int, epoch: int) -> np.ndarray:
        # The main source has the order that it has alone.
        stream = [self._seed, _ORDER, epoch, source] if source else [self._seed, _ORDER, epoch]
        return np.random.default_rng(stream).permutation(len(self._parts[source].records))


def shares_of_block(weights: Sequence[float]) -> list[int]:
    """How many of a block's images come from each source: the largest remainders are rounded up. Raises DataError."""
    exact = [_BLOCK * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: counts[source] - exact[source])
    for source in by_remainder[: _BLOCK - sum(counts)]:
        counts[source] += 1
    if min(counts) == 0:
        raise DataError(f"data.others: a weight is below 1/{_BLOCK} of all; raise it, or leave the source out")
    return counts


def derangement(n: int, seed: int, images_N: Sequence[Hashable] | None = None) -> np.ndarray:
    """A random permutation of 0 … n−1 that leaves nothing in its place (n ≥ 2); in one cycle if all images differ.

    images_N: what tells the images apart, if some may be the same; none then goes to the place of an equal one.
    Raises DataError if one image makes up more than half.
    """
    order = np.random.default_rng([seed, _PAIRS]).permutation(n)
    shift = 1
    if images_N is not None:
        first: dict[Hashable, int] = {}
        group_of_place = np.array([first.setdefault(images_N[i], place) for place, i in enumerate(order)])
        # Equal images side by side, and everything moved by as many places as the commonest has.
        order = order[np.argsort(group_of_place, kind="stable")]
        shift = int(np.bincount(group_of_place).max())
        if 2 * shift > n:
            raise DataError(f"{shift} of {n} images are the same one; they cannot all get another image's questions")
    target = np.empty(n, dtype=np.int64)
    target[order] = np.roll(order, shift)
    return target


def image_digests(records: Sequence[Record]) -> list[tuple[bytes, ...]]:
    """The SHA-256 of each image of every record; what cannot be read counts as an image of its own."""
    digests: list[tuple[bytes, ...]] = []
    for place, record in enumerate(counted(records, "comparing images", len(records))):
        try:
            digests.append(tuple(hashlib.sha256(data).digest() for data in record.image_bytes()))
        except DataError:
            digests.append((f"unreadable {place}".encode(),))
    return digests
