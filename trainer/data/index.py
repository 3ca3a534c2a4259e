"""Records of a split as a sequence that builds each one when it is asked for.

What stays in memory is a few arrays: per question its record, kind, answer and a hash of its text as numbers, so that
questions can be chosen and counted without reading a file. Letters: N records, Q questions.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import overload

import numpy as np

from shared.errors import DataError
from trainer.data.records import KindQuestion, Record

Build = Callable[[int, np.ndarray], Record]
"""Record n with all its questions, from n and the numbers of its questions in the order of the file."""

_KEPT_RECORDS = 4096
"""Last built, so that a small data set is parsed once and not in every epoch."""
_MIX = np.uint64(0x9E3779B97F4A7C15)
"""An odd number without a pattern: its products spread over all 64 bits."""
_HELD_OUT_SEED = 6
"""Not the run's: runs of all seeds are tested on the same questions."""


class Texts:
    """A column of texts that repeat, as numbers of distinct ones."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}
        self._numbers = array("i")

    def append(self, text: str) -> None:
        """Add a value."""
        self._numbers.append(self._number.setdefault(text, len(self._number)))

    def column(self) -> tuple[list[str], np.ndarray]:
        """The distinct texts, and for every value which one it is."""
        return list(self._number), np.array(self._numbers, dtype=np.int32)


class QuestionColumns:
    """Record, kind, answer and text of every question, in the order of the file."""

    def __init__(self) -> None:
        self._records = array("i")
        self._kinds, self._answers = Texts(), Texts()
        self._hashes = array("q")

    def __len__(self) -> int:
        return len(self._records)

    def append(self, record: int, question: KindQuestion) -> None:
        """Add a question of a record, which is counted from 0."""
        self._records.append(record)
        self._kinds.append(question.kind)
        self._answers.append(question.answer)
        self._hashes.append(hash(question.text))

    def records(self, build: Build, n_records: int) -> Records:
        """The sequence of all records."""
        record_Q = np.array(self._records, dtype=np.int32)
        order_Q = np.argsort(record_Q, kind="stable").astype(np.int32)
        starts = np.concatenate([[0], np.cumsum(np.bincount(record_Q, minlength=n_records))])
        (kinds, kind_Q), (answers, answer_Q) = self._kinds.column(), self._answers.column()
        every = np.arange(n_records)
        hash_Q = np.array(self._hashes, dtype=np.int64).view(np.uint64)[order_Q]
        index = _Index(build, order_Q, starts, kinds, kind_Q[order_Q], answers, answer_Q[order_Q], hash_Q)
        return Records(index, every, every, np.ones(len(order_Q), dtype=bool))


class _Index:
    """What all views of a split share."""

    def __init__(
        self,
        build: Build,
        order_Q: np.ndarray,
        starts: np.ndarray,
        kinds: list[str],
        kind_Q: np.ndarray,
        answers: list[str],
        answer_Q: np.ndarray,
        hash_Q: np.ndarray,
    ):
        self._build, self._order_Q, self.starts = build, order_Q, starts
        self.build = lru_cache(_KEPT_RECORDS)(self._checked)
        self.kinds, self.kind_Q = kinds, kind_Q
        self.answers, self.answer_Q = answers, answer_Q
        self.hash_Q = hash_Q

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """What grows with the split."""
        return self._order_Q, self.starts, self.kind_Q, self.answer_Q, self.hash_Q

    def _checked(self, row: int) -> Record:
        """A record with all its questions. Raises DataError."""
        record = self._build(row, self._order_Q[self.starts[row] : self.starts[row + 1]])
        if len(record.questions) != self.starts[row + 1] - self.starts[row]:
            raise DataError(f"{record.where}: record {record.record_id} has changed since it was indexed; start again")
        return record


class Records(Sequence[Record]):
    """A view: which records, whose questions each of them has, which questions are left. Safe to read from any thread.

    Reading a record raises DataError if its file has changed.
    """

    def __init__(self, index: _Index, rows_N: np.ndarray, asked_N: np.ndarray, kept_Q: np.ndarray):
        self._index, self._rows_N, self._asked_N, self._kept_Q = index, rows_N, asked_N, kept_Q

    def __len__(self) -> int:
        return len(self._rows_N)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> Records: ...
    def __getitem__(self, place: int | slice) -> Record | Records:
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        row, asked = int(self._rows_N[place]), int(self._asked_N[place])
        record = self._index.build(row)
        questions = record.questions if row == asked else self._index.build(asked).questions
        kept = self._kept_Q[self._index.starts[asked] : self._index.starts[asked + 1]]
        return replace(record, questions=tuple(q for q, keep in zip(questions, kept, strict=True) if keep))

    def take(self, places: np.ndarray) -> Records:
        """The records at these places, in this order."""
        return Records(self._index, self._rows_N[places], self._asked_N[places], self._kept_Q)

    def with_questions_of(self, places: np.ndarray) -> Records:
        """Every record n with the questions of the record at places[n] instead of its own."""
        return Records(self._index, self._rows_N, self._asked_N[places], self._kept_Q)

    def without_kinds(self, kinds: Collection[str]) -> Records:
        """Without the questions of these kinds; records left with none are dropped."""
        return self._without(np.isin(self._index.kind_Q, _numbers(self._index.kinds, kinds)))

    def without_answers(self, answers: Collection[str]) -> Records:
        """Without the questions with these answers; records left with none are dropped."""
        return self._without(np.isin(self._index.answer_Q, _numbers(self._index.answers, answers)))

    def with_answers(self, answers: Collection[str]) -> Records:
        """Only the questions with these answers; records left with none are dropped."""
        return self._without(~np.isin(self._index.answer_Q, _numbers(self._index.answers, answers)))

    def kept(self) -> Records:
        """Itself, its records built now if they are few enough to stay in memory, so that no step parses any."""
        if len(self) <= _KEPT_RECORDS:
            for _ in self:
                pass
        return self

    def with_held_out_questions(self) -> Records:
        """Only the question of every record that is held out; records of a single question have none."""
        return self._without(~self._held_out())

    def without_held_out_questions(self, images_N: Sequence[Hashable]) -> Records:
        """All but the question of every record that is held out, wherever it is asked of the same image.

        images_N: what tells the images apart; equal ones may stand in several records.
        """
        number_of: dict[Hashable, int] = {}
        group_N = np.arange(len(self._index.starts) - 1) + len(images_N)  # records that are not in view: each its own
        group_N[self._rows_N] = [number_of.setdefault(image, len(number_of)) for image in images_N]
        group_Q = np.repeat(group_N.astype(np.uint64) * _MIX, np.diff(self._index.starts))
        asked_Q = self._index.hash_Q ^ group_Q
        return self._without(np.isin(asked_Q, asked_Q[self._held_out()]))

    @property
    def index_bytes(self) -> int:
        """Memory of this view and of the arrays that all views share; places in files come on top."""
        arrays = (self._rows_N, self._asked_N, self._kept_Q, *self._index.arrays)
        return sum(values.nbytes for values in arrays) + sum(map(len, self._index.answers))

    def kinds(self) -> Counter[str]:
        """How many questions of each kind there are."""
        return self._count(self._index.kinds, self._index.kind_Q)

    def answers(self, kind: str | None = None) -> Counter[str]:
        """How many questions have each answer, of one kind or of all."""
        of_kind = None if kind is None else self._index.kind_Q == self._index.kinds.index(kind)
        return self._count(self._index.answers, self._index.answer_Q, of_kind)

    def _held_out(self) -> np.ndarray:
        """One question at random of every record with two or more; all views of a file agree on it."""
        starts = self._index.starts
        counts_N = np.diff(starts)
        drawn_N = np.floor(np.random.default_rng(_HELD_OUT_SEED).random(len(counts_N)) * counts_N).astype(np.int64)
        held_Q = np.zeros(int(starts[-1]), dtype=bool)
        held_Q[(starts[:-1] + drawn_N)[counts_N >= 2]] = True
        return held_Q

    def _without(self, dropped_Q: np.ndarray) -> Records:
        kept_Q = self._kept_Q & ~dropped_Q
        view = Records(self._index, self._rows_N, self._asked_N, kept_Q)
        return view.take(np.flatnonzero(view._per_record(kept_Q)))

    def _per_record(self, chosen_Q: np.ndarray) -> np.ndarray:
        """How many of the chosen questions each record has."""
        before = np.concatenate([[0], np.cumsum(chosen_Q)])
        starts = self._index.starts
        return before[starts[self._asked_N + 1]] - before[starts[self._asked_N]]

    def _count(self, texts: list[str], number_Q: np.ndarray, of_kind_Q: np.ndarray | None = None) -> Counter[str]:
        starts = self._index.starts
        times = np.bincount(self._asked_N, minlength=len(starts) - 1)
        weight_Q = np.repeat(times, np.diff(starts)) * self._kept_Q
        if of_kind_Q is not None:
            weight_Q = weight_Q * of_kind_Q
        counts = np.bincount(number_Q, weights=weight_Q, minlength=len(texts))
        return Counter({text: int(n) for text, n in zip(texts, counts, strict=True) if n})


def _numbers(texts: list[str], wanted: Collection[str]) -> list[int]:
    return [number for number, text in enumerate(texts) if text in wanted]
