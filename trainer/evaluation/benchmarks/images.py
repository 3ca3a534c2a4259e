"""Images that stay in their file (image, parquet or tsv) until they are loaded."""

from __future__ import annotations

import base64
import binascii
import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow
import pyarrow.parquet as parquet
from PIL import Image

from shared.errors import DataError

MAX_IMAGE_BYTES = 64 * 2**20
MAX_FIELD_CHARS = MAX_IMAGE_BYTES * 4 // 3 + 4
"""Of a tsv, whose longest field is an image in base64."""
csv.field_size_limit(MAX_FIELD_CHARS)


class ImageRef(Protocol):
    """Where an image lies."""

    def load(self) -> Image.Image:
        """The image as RGB. Raises DataError naming file and record."""


@dataclass(frozen=True, slots=True)
class FileImage:
    """An image file."""

    path: Path

    def load(self) -> Image.Image:
        """The image as RGB. Raises DataError."""
        try:
            size = self.path.stat().st_size
            if size > MAX_IMAGE_BYTES:
                raise DataError(_too_large(str(self.path), size))
            return decode(self.path.read_bytes(), str(self.path))
        except OSError as error:
            raise DataError(f"{self.path}: image cannot be read ({error.strerror}); restore the file") from error


@dataclass(frozen=True, slots=True)
class ParquetImage:
    """A cell of a parquet file: bytes, the hub's struct with `bytes`, or base64."""

    path: Path
    column: str
    row: int

    def load(self) -> Image.Image:
        """The image as RGB; in order of rows, all images of a file take one pass. Raises DataError."""
        where = f"{self.path}: row {self.row}, column {self.column!r}"
        try:
            cell = _parquet_column(self.path, self.column).cell(self.row)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{where}: no readable parquet ({error}); copy the file again") from error
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if isinstance(content, str):
            content = from_base64(content, where)
        if not isinstance(content, bytes):
            raise DataError(f"{where}: no image bytes; use the file with embedded images")
        return decode(content, where)


@dataclass(frozen=True, slots=True)
class TsvImage:
    """A base64 field of a tsv, found by the byte offset at which its record begins."""

    path: Path
    offset: int
    column: int

    def load(self) -> Image.Image:
        """The image as RGB. Raises DataError."""
        where = f"{self.path}: record at byte {self.offset}"
        with self.path.open("rb") as file:
            file.seek(self.offset)
            fields = next(csv.reader(CountedLines(file, self.offset), delimiter="\t"))
        return decode(from_base64(fields[self.column], where), where)


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


class _ParquetColumn:
    """Cells of one column, read forwards one row at a time; only a step backwards opens the file again."""

    def __init__(self, path: Path, column: str):
        self._path, self._column = path, column
        self._cells: Iterator[Any] = iter(())
        self._next_row = -1

    def cell(self, row: int) -> Any:
        if not 0 <= self._next_row <= row:
            self._open_at(row)
        for _ in range(self._next_row, row):
            next(self._cells)
        self._next_row = row + 1
        return next(self._cells)

    def _open_at(self, row: int) -> None:
        """Start at the row group that holds the row."""
        file = parquet.ParquetFile(self._path)
        first, group = 0, 0
        while first + file.metadata.row_group(group).num_rows <= row:
            first += file.metadata.row_group(group).num_rows
            group += 1
        groups = list(range(group, file.metadata.num_row_groups))
        batches = file.iter_batches(batch_size=1, row_groups=groups, columns=[self._column])
        self._cells = (batch.column(0)[0].as_py() for batch in batches)
        self._next_row = first


@lru_cache(maxsize=8)
def _parquet_column(path: Path, column: str) -> _ParquetColumn:
    return _ParquetColumn(path, column)


def from_base64(text: str, where: str) -> bytes:
    """The bytes. Raises DataError."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: the image is not base64 ({error}); copy the file again") from error


def decode(content: bytes, where: str) -> Image.Image:
    """RGB image of an encoded one. Raises DataError if it is too large or damaged."""
    if len(content) > MAX_IMAGE_BYTES:
        raise DataError(_too_large(where, len(content)))
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{where}: the image cannot be read ({reason}); restore it") from error


def _too_large(where: str, size: int) -> str:
    return f"{where}: the image has {size} bytes, more than {MAX_IMAGE_BYTES}; it is no image of this benchmark"
