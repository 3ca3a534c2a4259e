"""Readers of the formats that benchmarks are published in: parquet, tsv, csv, jsonl, json. Rows come one by one.

Everything here is outside input: sizes are bounded, paths must stay in the benchmark's folder, and each error names
file and row.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet

from shared.errors import DataError
from trainer.data.images import CountedLines, ParquetImage, TsvImage
from trainer.data.records import ImageFile, ImageSource

MAX_JSON_BYTES = 512 * 2**20
MAX_LINE_BYTES = 2**20
MAX_ROWS = 1_000_000
MAX_TEXT_CHARS = 20_000


@dataclass(frozen=True, slots=True)
class Row:
    """The fields of one record and where they stand."""

    fields: dict[str, Any]
    where: str

    def text(self, key: str) -> str:
        """A field as text without surrounding space; numbers as written by str. Raises DataError if it is empty."""
        value = self.fields.get(key)
        text = "" if value is None else str(value).strip()
        if not text:
            raise self.error(f"no {key!r}", "correct or drop the record")
        if len(text) > MAX_TEXT_CHARS:
            raise self.error(f"{key!r} has {len(text)} characters, more than {MAX_TEXT_CHARS}", "correct the record")
        return text

    def texts(self, key: str) -> tuple[str, ...]:
        """A field that is a list of texts. Raises DataError if it is none or empty."""
        value = self.fields.get(key)
        if not isinstance(value, list) or not value:
            raise self.error(f"{key!r} is no list of texts", "correct or drop the record")
        return tuple(Row({key: item}, self.where).text(key) for item in value)

    def error(self, problem: str, remedy: str) -> DataError:
        """A DataError that names file and record."""
        return DataError(f"{self.where}: {problem}; {remedy}")


def find_files(folder: Path, *patterns: str) -> list[Path]:
    """Files of the first glob pattern that matches any, sorted. Raises DataError if none does."""
    for pattern in patterns:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if found:
            return found
    raise DataError(f"{folder}: no {' or '.join(patterns)}; give the folder that holds the published files")


def image_file(folder: Path, relative: str, where: str) -> ImageFile:
    """An image below the folder. Raises DataError if it is missing or the path leads out of the folder."""
    path = folder / relative
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{where}: image {relative!r} leads out of {folder}; correct the record")
    if not path.is_file():
        raise DataError(f"{path}: image is missing ({where}); restore the file")
    return ImageFile(path)


def read_rows(file: Path, image: str = "image", *more_images: str) -> Iterator[Row]:
    """Rows of a file of any of the formats, told by its ending; `image` and `more_images` are its image columns."""
    if file.suffix == ".parquet":
        return read_parquet(file, (image, *more_images))
    if file.suffix == ".tsv":
        return read_tsv(file, image)
    return {".csv": read_csv, ".jsonl": read_jsonl, ".json": read_json}[file.suffix](file)


def published(*patterns: str, images: tuple[str, ...] = ("image",)) -> Callable[[Path], Iterator[Row]]:
    """Rows of all files that the first matching glob pattern finds."""

    def rows(folder: Path) -> Iterator[Row]:
        for file in find_files(folder, *patterns):
            yield from read_rows(file, *images)

    return rows


def image_of(row: Row, key: str, folder: Path) -> ImageSource:
    """The image that a row holds, or the file below `folder` that it names. Raises DataError if there is neither."""
    value = row.fields.get(key)
    if isinstance(value, ParquetImage | TsvImage):
        return value
    return image_file(folder, row.text(key), row.where)


def read_parquet(file: Path, images: Sequence[str]) -> Iterator[Row]:
    """Rows of a parquet file. The columns in `images` become an ImageSource, or None where the cell is empty."""
    try:
        content = parquet.ParquetFile(file)
        _bound_rows(file, content.metadata.num_rows)
        names = content.schema_arrow.names
        present = {name: _present(content, name) for name in images if name in names}
        others = content.read(columns=[name for name in names if name not in images]).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: no readable parquet ({error}); copy the file again") from error
    for index, fields in enumerate(others):
        cells = {name: ParquetImage(file, name, index) if there[index] else None for name, there in present.items()}
        yield Row({**fields, **cells}, f"{file}: row {index}")


def _present(content: parquet.ParquetFile, column: str) -> list[bool]:
    """Which cells of a column are filled; the column is read only if the file's own statistics leave it open."""
    groups = [content.metadata.row_group(number) for number in range(content.num_row_groups)]
    chunks = [group.column(leaf) for group in groups for leaf in range(group.num_columns)]
    leaves = [chunk for chunk in chunks if chunk.path_in_schema in (column, f"{column}.bytes")]
    if leaves and all(leaf.statistics is not None and leaf.statistics.null_count == 0 for leaf in leaves):
        return [True] * content.metadata.num_rows
    filled: list[bool] = []
    for batch in content.iter_batches(batch_size=16, columns=[column]):
        filled.extend(batch.column(0).is_valid().to_pylist())
    return filled


def read_tsv(file: Path, image: str) -> Iterator[Row]:
    """Rows of a tsv whose column `image` holds base64, or the `index` of the row that has the image.

    The reference by index is VLMEvalKit's (vlmeval/dataset/image_base.py): a field of at most 64 characters.
    """
    by_index: dict[str, TsvImage] = {}
    with file.open("rb") as binary:
        lines = CountedLines(binary)
        reader = csv.reader(lines, delimiter="\t")
        try:
            header = next(reader, [])
            if image not in header:
                raise DataError(f"{file}: no column {image!r}; give the published file")
            column, offset = header.index(image), lines.offset
            for number, values in enumerate(reader):
                _bound_rows(file, number)
                where = f"{file}: row {number}"
                if len(values) != len(header):
                    raise DataError(f"{where}: {len(values)} fields, not {len(header)}; copy the file again")
                fields: dict[str, Any] = dict(zip(header, values, strict=True))
                reference = fields[image].strip()
                if len(reference) <= 64:
                    fields[image] = by_index.get(reference)
                else:
                    fields[image] = by_index[str(fields.get("index", number))] = TsvImage(file, offset, column)
                yield Row(fields, where)
                offset = lines.offset
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{file}: no readable tsv at byte {lines.offset} ({error}); copy the file again") from error


def read_csv(file: Path) -> Iterator[Row]:
    """Rows of a csv file with a header."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            for number, fields in enumerate(csv.DictReader(lines)):
                _bound_rows(file, number)
                yield Row(fields, f"{file}: row {number}")
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file}: no readable csv ({error}); copy the file again") from error


def read_jsonl(file: Path) -> Iterator[Row]:
    """Rows of a file with one JSON object per line; empty lines are skipped."""
    with file.open("rb") as lines:
        number = 0
        while line := lines.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{file}: line {number}"
            _bound_rows(file, number)
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{where}: longer than {MAX_LINE_BYTES} bytes; give the published file")
            if line.strip():
                yield _row(_parse(line, where), where)


def read_json(file: Path) -> Iterator[Row]:
    """Rows of a JSON list, or of an object of objects whose key becomes the field `id`."""
    if file.stat().st_size > MAX_JSON_BYTES:
        raise DataError(f"{file}: more than {MAX_JSON_BYTES} bytes; give the published file")
    content = _parse(file.read_bytes(), str(file))
    _bound_rows(file, len(content) if isinstance(content, list | dict) else 0)
    if isinstance(content, dict):
        for key, fields in content.items():
            row = _row(fields, f"{file}: record {key!r}")
            yield Row({"id": key, **row.fields}, row.where)
    elif isinstance(content, list):
        for number, fields in enumerate(content):
            yield _row(fields, f"{file}: record {number}")
    else:
        raise DataError(f"{file}: neither a list nor an object; give the published file")


def read_text(file: Path) -> str:
    """A small text file. Raises DataError."""
    try:
        if file.stat().st_size > MAX_LINE_BYTES:
            raise DataError(f"{file}: more than {MAX_LINE_BYTES} bytes; give the published file")
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{file}: missing; restore the published folder") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 ({error.reason}); copy the file again") from error


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: no valid JSON ({error}); copy the file again") from error


def _row(fields: Any, where: str) -> Row:
    if not isinstance(fields, dict):
        raise DataError(f"{where}: not a JSON object; copy the file again")
    return Row(fields, where)


def _bound_rows(file: Path, rows: int) -> None:
    if rows > MAX_ROWS:
        raise DataError(f"{file}: more than {MAX_ROWS} records; give the published file")
