"""Images that lie in a part of a file, read when they are needed: cells of parquet or tsv files, spans of archives.

Each is an `ImageSource` (trainer/data/records.py); images in files of their own are `ImageFile`s.
"""

from __future__ import annotations

import base64
import binascii
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet as parquet
from PIL import Image

from shared.errors import DataError
from shared.images import decode_image
from trainer.data.records import MAX_FILE_BYTES, ImageSource

MAX_FIELD_CHARS = MAX_FILE_BYTES * 4 // 3 + 4
"""Of a tsv, whose longest field is an image in base64."""
csv.field_size_limit(MAX_FIELD_CHARS)
ARROW_ERRORS = (pyarrow.ArrowException, OSError, ValueError, OverflowError, IndexError)
"""What pyarrow raises on damaged files; ValueError for names that are no UTF-8, IndexError for lengths that lie."""


def load_image(source: ImageSource) -> Image.Image:
    """An image as RGB. Raises DataError naming its file and place."""
    try:
        return decode_image(source.read())
    except (OSError, DataError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{source}: the image cannot be read ({reason}); restore it") from error


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Bytes of an archive that are an image file."""

    path: Path
    offset: int
    length: int

    def read(self) -> bytes:
        """The file's content. Raises OSError."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.length)
        if len(data) < self.length:
            raise OSError("the archive is cut short")
        return data

    def __str__(self) -> str:
        return f"{self.path}: member at byte {self.offset}"


@dataclass(frozen=True, slots=True)
class ParquetImage:
    """A cell of a parquet file: bytes, the hub's struct with `bytes`, or base64; `item` of the cell if it is a list."""

    path: Path
    column: str
    row: int
    item: int = 0

    def read(self) -> bytes:
        """The encoded image; in order of rows, all images of a file take one pass. Raises OSError. Thread-safe."""
        try:
            cell = _parquet_column(self.path, self.column).cell(self.row)
        except (*ARROW_ERRORS, StopIteration, IndexError) as error:
            raise OSError(f"no readable parquet: {error}") from error
        return cell_bytes(cell, self.item)

    def __str__(self) -> str:
        return f"{self.path}: row {self.row}, column {self.column!r}"


@dataclass(frozen=True, slots=True)
class TsvImage:
    """A base64 field of a tsv, found by the byte offset at which its record begins."""

    path: Path
    offset: int
    column: int

    def read(self) -> bytes:
        """The encoded image. Raises OSError."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            fields = next(csv.reader(CountedLines(file, self.offset), delimiter="\t"))
        return _from_base64(fields[self.column])

    def __str__(self) -> str:
        return f"{self.path}: record at byte {self.offset}"


class CountedLines:
    """Lines of a UTF-8 file as text, knowing the byte at which the next one begins."""

    def __init__(self, file: BinaryIO, offset: int = 0):
        self.offset = offset
        self._file = file

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_FIELD_CHARS)
        if not line:
            raise StopIteration
        self.offset += len(line)
        return line.decode("utf-8")


def cell_bytes(cell: Any, item: int = 0) -> bytes:
    """The encoded image that a table's cell holds, or one item of the cell if it is a list. Raises OSError."""
    if isinstance(cell, list):
        if item >= len(cell):
            raise OSError(f"no image number {item} in the cell")
        cell = cell[item]
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(content, str):
        content = _from_base64(content)
    if not isinstance(content, bytes):
        raise OSError("no image bytes; use the file with embedded images")
    if len(content) > MAX_FILE_BYTES:
        raise OSError(f"{len(content)} bytes, more than {MAX_FILE_BYTES}")
    return content


class _ParquetColumn:
    """Cells of one column, read forwards one row at a time; only a step backwards opens the file again."""

    def __init__(self, path: Path, column: str):
        self._path, self._column = path, column
        self._cells: Iterator[Any] = iter(())
        self._next_row = -1
        self._lock = Lock()

    def cell(self, row: int) -> Any:
        with self._lock:
            if not 0 <= self._next_row <= row:
                self._open_at(row)
            for _ in range(self._next_row, row):
                next(self._cells)
            self._next_row = row + 1
            return next(self._cells).as_py()

    def _open_at(self, row: int) -> None:
        """Start at the row group that holds the row."""
        file = parquet.ParquetFile(self._path)
        first, group = 0, 0
        while first + file.metadata.row_group(group).num_rows <= row:
            first += file.metadata.row_group(group).num_rows
            group += 1
        groups = list(range(group, file.metadata.num_row_groups))
        batches = file.iter_batches(batch_size=1, row_groups=groups, columns=[self._column])
        self._cells = (batch.column(0)[0] for batch in batches)
        self._next_row = first


@lru_cache(maxsize=8)
def _parquet_column(path: Path, column: str) -> _ParquetColumn:
    return _ParquetColumn(path, column)


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise OSError(f"the image is not base64: {error}") from error
