"""Tables whose cells hold encoded images: parquet files, and data sets of the Hugging Face library.

    source parquet     ROOT/SPLIT.parquet, ROOT/SPLIT-*.parquet, ROOT/data/SPLIT-*.parquet or ROOT/SPLIT/*.parquet
    source datasets    a hub name, a folder that `load_dataset` takes, or one that `save_to_disk` wrote

Which columns hold what is in `data.options.columns`. A cell of questions may be a list; a dot leads into objects:
`question: texts.user, answer: texts.assistant` reads lists of {user, assistant}. Texts of parquet files stay in memory
as Arrow arrays; images, and all of a `datasets` table, stay on disk. Shuffled reading of parquet reads half a row group
per image: prefer `datasets`, or row groups of a hundred rows.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
from pydantic import Field

from shared.config import Section
from shared.errors import DataError
from trainer.data.fields import MAX_IMAGES, MAX_QUESTIONS, question_of, text_of
from trainer.data.images import ARROW_ERRORS, ParquetImage, cell_bytes
from trainer.data.index import QuestionColumns, Records
from trainer.data.records import ImageSource, KindQuestion, OnError, Record, raise_error
from trainer.data.spans import counted

_BATCH_ROWS = 1000


class Columns(Section):
    """Which column holds what."""

    image: tuple[str, ...] = Field(("image",), min_length=1, description="One or more columns of images.")
    question: str = "question"
    answer: str = "answer"
    kind: str | None = None
    id: str | None = Field(None, description="By default the row's number.")


class TableOptions(Section):
    """Options of source parquet."""

    columns: Columns = Columns()


class DatasetOptions(TableOptions):
    """Options of source datasets."""

    name: str | None = Field(None, description="Configuration of the data set, its `name` in load_dataset.")


_TABLE_DEFAULTS, _DATASET_DEFAULTS = TableOptions(), DatasetOptions()


class Table(Protocol):
    """Rows by number. Names of columns are those of the top level."""

    def __len__(self) -> int: ...

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise DataError if one is missing."""

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every row with its number, and these columns. Raises DataError."""

    def row(self, row: int) -> dict[str, Any]:
        """One row, with the columns that `rows` was asked for. Raises DataError."""

    def where(self, row: int) -> str:
        """Its name, for messages."""

    def images(self, row: int, column: str) -> tuple[ImageSource, ...]:
        """What a cell holds. Raises DataError."""


class ParquetFiles:
    """Some parquet files as one table."""

    def __init__(self, files: Sequence[Path], on_error: OnError):
        self._files, self._starts = [], [0]
        for file in files:
            try:
                self._starts.append(self._starts[-1] + parquet.read_metadata(file).num_rows)
                self._files.append(file)
            except ARROW_ERRORS as error:
                on_error(DataError(f"{file}: no readable parquet ({_reason(error)}); copy the file again"))
        self._parts: list[pyarrow.Table] = []

    def __len__(self) -> int:
        return self._starts[-1]

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise DataError if one is missing in one of the files."""
        for file in self._files:
            try:
                names = parquet.read_schema(file).names
            except ARROW_ERRORS as error:
                raise DataError(f"{file}: no readable parquet ({_reason(error)}); copy the file again") from error
            _check_columns(columns, names, str(file))

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every row with its number, and these columns, which then stay in memory. Raises DataError."""
        for file in self._files:
            try:
                part = parquet.ParquetFile(file).read(columns=list(columns))
                part.validate(full=True)
            except ARROW_ERRORS as error:
                raise DataError(f"{file}: no readable parquet ({_reason(error)}); copy the file again") from error
            self._parts.append(part)
        return ((row, self.row(row)) for row in range(len(self)))

    def row(self, row: int) -> dict[str, Any]:
        """One row. Raises DataError."""
        number, local = self._place(row)
        try:
            return {name: self._parts[number].column(name)[local].as_py() for name in self._parts[number].column_names}
        except ARROW_ERRORS as error:
            raise DataError(f"{self.where(row)}: cannot be read ({_reason(error)}); correct or drop the row") from error

    def where(self, row: int) -> str:
        """File and row, for messages."""
        number, local = self._place(row)
        return f"{self._files[number]}: row {local}"

    def images(self, row: int, column: str) -> tuple[ImageSource, ...]:
        """The one image of a cell."""
        number, local = self._place(row)
        return (ParquetImage(self._files[number], column, local),)

    def _place(self, row: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return number, row - self._starts[number]


class DatasetTable:
    """A split of a data set of the Hugging Face library. Its rows lie in memory-mapped Arrow files."""

    def __init__(self, dataset: Any, name: str, root: Path):
        self._dataset, self._name, self._root = dataset.with_format("arrow"), name, root
        self._texts = self._dataset
        self._columns = {column: self._dataset.select_columns([column]) for column in dataset.column_names}

    def __len__(self) -> int:
        return len(self._dataset)

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise DataError if one is missing."""
        _check_columns(columns, self._dataset.column_names, self._name)

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every row with its number, and these columns."""
        self._texts = self._dataset.select_columns(list(columns))
        return ((row, fields) for first in range(0, len(self), _BATCH_ROWS) for row, fields in self._batch(first))

    def row(self, row: int) -> dict[str, Any]:
        """One row."""
        return dict(self._texts[row].to_pylist()[0])

    def where(self, row: int) -> str:
        """Data set and row, for messages."""
        return f"{self._name}: row {row}"

    def images(self, row: int, column: str) -> tuple[ImageSource, ...]:
        """The one image of a cell, or all of a list. Raises DataError."""
        cell = self._columns[column][row].column(0)[0]
        n = len(cell.as_py()) if pyarrow.types.is_list(cell.type) else 1
        if not 0 < n <= MAX_IMAGES:
            raise DataError(f"{self.where(row)}: {n} images in {column!r}, not 1 to {MAX_IMAGES}; drop the row")
        return tuple(DatasetImage(self, row, column, item) for item in range(n))

    def encoded(self, row: int, column: str, item: int) -> bytes:
        """The encoded image of a cell, or of the file below the root that it names. Raises OSError."""
        cell = self._columns[column][row].column(0)[0].as_py()
        cell = cell[item] if isinstance(cell, list) else cell
        if isinstance(cell, dict) and cell.get("bytes") is None and cell.get("path"):
            path, root = os.path.realpath(cell["path"]), os.path.realpath(self._root)
            if os.path.commonpath([path, root]) != root:
                raise OSError(f"{path} lies outside of {self._root}")
            return Path(path).read_bytes()
        return cell_bytes(cell)

    def _batch(self, first: int) -> Iterator[tuple[int, dict[str, Any]]]:
        batch = self._texts[first : first + _BATCH_ROWS].to_pylist()
        return ((first + n, fields) for n, fields in enumerate(batch))


@dataclass(frozen=True, slots=True)
class DatasetImage:
    """A cell of a `DatasetTable`, or an item of it."""

    table: DatasetTable
    row: int
    column: str
    item: int

    def read(self) -> bytes:
        """The encoded image. Raises OSError."""
        return self.table.encoded(self.row, self.column, self.item)

    def __str__(self) -> str:
        return f"{self.table.where(self.row)}, column {self.column!r}"


def load_parquet(
    root: Path, split: str, on_error: OnError = raise_error, options: TableOptions = _TABLE_DEFAULTS
) -> Records:
    """Records of one split, one per row.

    Damaged rows and files go to `on_error`, which raises or counts them; no file at all always raises DataError.
    """
    table = ParquetFiles(split_files(root, split, "parquet"), on_error)
    return _table_records(table, "parquet", str(root), split, on_error, options.columns)


def load_dataset(
    root: Path, split: str, on_error: OnError = raise_error, options: DatasetOptions = _DATASET_DEFAULTS
) -> Records:
    """Records of one split, one per row. root: may be a hub name, found in the local cache if HF_HUB_OFFLINE is set.

    Damaged rows go to `on_error`, which raises or counts them; no such data set always raises DataError.
    """
    import datasets

    try:
        if (root / split / "state.json").is_file():
            dataset = _saved_dataset(root / split)
        else:
            dataset = datasets.load_dataset(str(root), options.name, split=split)
        dataset.data.table.validate(full=True)  # Arrow maps files into memory unread; wrong offsets would crash
    except Exception as error:  # the library raises nearly anything on absent and damaged files
        raise DataError(
            f"{root}: split {split!r} cannot be loaded ({_reason(error)}); check data.path, data.split names and "
            "data.options.name"
        ) from error
    table = DatasetTable(dataset, f"{root}, split {split}", root)
    return _table_records(table, "datasets", str(root), split, on_error, options.columns)


def _saved_dataset(folder: Path) -> Any:
    import datasets

    if not json.loads((folder / "state.json").read_bytes())["_data_files"]:
        raise ValueError("no usable record")  # the library says: list index out of range
    return datasets.load_from_disk(folder)


def split_files(root: Path, split: str, ending: str) -> list[Path]:
    """Files of a split, in the first layout that has any. Raises DataError."""
    patterns = [f"{split}.{ending}", f"{split}-*.{ending}", f"data/{split}-*.{ending}", f"{split}/*.{ending}"]
    for pattern in patterns:
        if files := sorted(root.glob(pattern)):
            return files
    raise DataError(f"{root}: no {', '.join(patterns)}; check data.path and data.split names")


def _table_records(table: Table, source: str, root: str, split: str, on_error: OnError, columns: Columns) -> Records:
    named = [columns.question, columns.answer, columns.kind, columns.id]
    needed = sorted({name.split(".")[0] for name in named if name is not None})
    table.check_columns([*needed, *columns.image])
    index, rows, seen = QuestionColumns(), array("q"), set[int]()
    for row, fields in counted(table.rows(needed), f"reading {split}", len(table)):
        try:
            record_id, questions = _row(fields, row, columns, table.where(row))
        except DataError as error:
            on_error(error)
            continue
        if hash(record_id) in seen:
            on_error(DataError(f"{table.where(row)}: id {record_id!r} is used twice; drop one of them"))
            continue
        seen.add(hash(record_id))
        for question in questions:
            index.append(len(rows), question)
        rows.append(row)
    if not rows:
        raise DataError(f"{root}: no usable record in split {split}; check data.path and data.split names")

    def build(n: int, _questions: np.ndarray) -> Record:
        row = rows[n]
        record_id, questions = _row(table.row(row), row, columns, table.where(row))
        images = tuple(image for column in columns.image for image in table.images(row, column))
        return Record(f"{split}/{record_id}", source, images, questions)

    return index.records(build, len(rows))


def _row(fields: Mapping[str, Any], row: int, columns: Columns, where: str) -> tuple[str, tuple[KindQuestion, ...]]:
    """Id and questions of a row."""
    texts, answers = _pick(fields, columns.question), _pick(fields, columns.answer)
    kinds = None if columns.kind is None else _pick(fields, columns.kind)
    if not isinstance(texts, list):
        texts, answers, kinds = [texts], [answers], [kinds]
    kinds = kinds if isinstance(kinds, list) else [kinds] * len(texts)
    if not isinstance(answers, list) or not len(texts) == len(answers) == len(kinds):
        raise DataError(f"{where}: questions and answers are not equally many; correct or drop the row")
    if not 0 < len(texts) <= MAX_QUESTIONS:
        raise DataError(f"{where}: {len(texts)} questions, not 1 to {MAX_QUESTIONS}; correct or drop the row")
    triples = zip(texts, answers, kinds, strict=True)
    questions = tuple(question_of({"question": q, "answer": a, "kind": k}, where) for q, a, k in triples)
    identity = row if columns.id is None else _pick(fields, columns.id)
    return str(identity) if type(identity) is int else text_of(identity, "id", where), questions


def _check_columns(columns: Iterable[str], names: Sequence[str], where: str) -> None:
    if missing := sorted(set(columns) - set(names)):
        have = ", ".join(names)
        raise DataError(f"{where}: no column {missing[0]!r}, only {have}; set data.options.columns")


def _pick(value: Any, path: str) -> Any:
    """The value under a dotted path; of a list, that of every item."""
    for key in path.split("."):
        if isinstance(value, list):
            value = [item.get(key) if isinstance(item, Mapping) else None for item in value]
        else:
            value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
