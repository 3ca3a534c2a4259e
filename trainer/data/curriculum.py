"""From simple questions to complex ones: which questions of an image may be asked at a step.

Questions stand on levels 0 … L−1 of difficulty, by their kind (`order`) or by how often a model answered them wrong
(`difficulty`, labels of `python -m trainer difficulty`). With x ∈ [0, 1] the progress of the schedule, a question of
level l is let through with probability

    w_l = min(1, max(0, x · (L − 1) − (l − 1)))

so at x = 0 only the simplest are asked, then one level after the other comes in, and at x = 1 all are asked as without
a curriculum. An image that is left with no question is asked those of its lowest level.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from shared.config import CurriculumConfig
from trainer.data.records import KindQuestion, Record

_MEASURED_LEVELS = 5
"""How many levels measured difficulty is cut into."""


def progress(schedule: str, step: int, n_steps: int, n_levels: int) -> float:
    """How far a schedule is, x: 1 from `n_steps` on. `steps` opens whole levels, the last one at `n_steps`."""
    share = min(1.0, step / n_steps)
    if schedule == "none":
        return 1.0
    if schedule == "linear":
        return share
    if schedule == "cosine":
        return (1 - math.cos(math.pi * share)) / 2
    return math.floor(share * (n_levels - 1) + 1e-9) / max(1, n_levels - 1)


def level_weights(x: float, n_levels: int) -> list[float]:
    """Probability w of each level."""
    return [min(1.0, max(0.0, x * (n_levels - 1) - (level - 1))) for level in range(n_levels)]


class Curriculum:
    """Levels of questions and their weights. Reads from any thread; nothing changes after construction."""

    def __init__(self, config: CurriculumConfig):
        """Raises DataError for damaged or unfinished labels."""
        self._config = config
        self._place: Callable[[Record, KindQuestion], int]
        if config.difficulty is not None:
            from trainer.difficulty import load_difficulty  # loads transformers

            self._labels = load_difficulty(config.difficulty)
            self.n_levels, self._place = _MEASURED_LEVELS, self._measured
        else:
            self._level_of_kind = {kind: level for level, kinds in enumerate(config.order) for kind in kinds}
            self.n_levels, self._place = len(config.order), self._by_kind

    @property
    def is_on(self) -> bool:
        """Whether any question is ever held back."""
        return self._config.schedule != "none"

    def weights(self, step: int) -> list[float]:
        """Probability w of each level at a step."""
        c = self._config
        return level_weights(progress(c.schedule, step, c.steps, self.n_levels), self.n_levels)

    def let_through(self, record: Record, step: int, rng: np.random.Generator) -> list[bool]:
        """For every question of a record whether it may be asked; at least one may."""
        levels = [self._place(record, question) for question in record.questions]
        weights = self.weights(step)
        drawn = rng.random(len(levels))
        kept = [bool(u < weights[level]) for u, level in zip(drawn, levels, strict=True)]
        return kept if any(kept) else [level == min(levels) for level in levels]

    def metrics(
        self, step: int, records: Sequence[Record], asked: Sequence[Sequence[KindQuestion]]
    ) -> dict[str, float]:
        """`weight/GROUP` of the schedule and `share/GROUP` of the questions asked; empty without a curriculum.

        A group is a kind of question, or with measured difficulty a level; those that the records have are named.
        """
        if not self.is_on:
            return {}
        levels: dict[str, int] = {}
        counts: Counter[str] = Counter()
        for record, questions in zip(records, asked, strict=True):
            levels |= {self._group(record, question): self._place(record, question) for question in record.questions}
            counts.update(self._group(record, question) for question in questions)
        weights = self.weights(step)
        shares = {f"share/{group}": counts[group] / counts.total() for group in levels}
        return shares | {f"weight/{group}": weights[level] for group, level in levels.items()}

    def _group(self, record: Record, question: KindQuestion) -> str:
        return question.kind if self._config.difficulty is None else f"level {self._place(record, question)}"

    def _by_kind(self, record: Record, question: KindQuestion) -> int:
        return self._level_of_kind.get(question.kind, self.n_levels - 1)

    def _measured(self, record: Record, question: KindQuestion) -> int:
        """By the share of wrong answers, rounded to the nearest level; without a label the last one."""
        label = self._labels.get((record.record_id, question.text))
        if label is None:
            return self.n_levels - 1
        wrong = 1 - label.right / label.samples
        return math.floor(wrong * (self.n_levels - 1) + 0.5)


def several_kinds_first(questions: Sequence[KindQuestion]) -> list[KindQuestion]:
    """The same questions: the first of every kind, then the second of every kind, and so on, each in the old order."""
    seen: dict[str, int] = {}
    rounds = []
    for question in questions:
        rounds.append(seen.get(question.kind, 0))
        seen[question.kind] = rounds[-1] + 1
    return [questions[i] for i in sorted(range(len(questions)), key=rounds.__getitem__)]
