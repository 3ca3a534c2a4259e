"""Any data set as one JSON object per line, with images in files.

    ROOT/SPLIT.jsonl
    {"id": "7", "images": ["a/7.png"], "questions": [{"question": "…", "answer": "…", "kind": "count"}], "scene": {}}

id: by default the line's number. images: relative to ROOT, one or more; `image` for a single one. questions: with text,
number or boolean answers and a kind (default: unknown); `question`, `answer`, `kind` for a single one. scene: optional
labels, any object. Other fields are ignored, so are empty lines.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shared.errors import DataError
from trainer.data.clevr import OnError, raise_error
from trainer.data.fields import MAX_IMAGES, ImageFolder, parse_object, questions_of, text_of
from trainer.data.index import QuestionColumns, Records
from trainer.data.records import ImageFile, Record

MAX_LINE_BYTES = 16 * 2**20


def load_jsonl(root: Path, split: str, on_error: OnError = raise_error) -> Records:
    """Records of one split in the order of the lines; each stays in the file until it is asked for.

    Damaged lines go to `on_error`, which raises or counts them; a missing file always raises DataError.
    """
    file = root / f"{split}.jsonl"
    folder = ImageFolder(root)
    columns, seen = QuestionColumns(), set[str]()
    offsets, lengths, numbers = array("q"), array("i"), array("i")
    try:
        with file.open("rb") as lines:
            for number, offset, line in _lines(lines, file, on_error):
                where = f"{file}: line {number}"
                try:
                    record = _record(line, split, number, folder, where, look=True)
                except DataError as error:
                    on_error(error)
                    continue
                if record.record_id in seen:
                    on_error(DataError(f"{where}: id {record.record_id!r} is used twice; rename one"))
                    continue
                seen.add(record.record_id)
                for question in record.questions:
                    columns.append(len(offsets), question)
                offsets.append(offset)
                lengths.append(len(line))
                numbers.append(number)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); data.path must hold SPLIT.jsonl") from error
    if not offsets:
        raise DataError(f"{file}: no usable record; check data.path and data.split names")
    offset_N, length_N, number_N = np.array(offsets), np.array(lengths), np.array(numbers)

    def build(n: int) -> Record:
        where = f"{file}: line {number_N[n]}"
        return _record(read_span(file, offset_N[n], length_N[n]), split, int(number_N[n]), folder, where, look=False)

    return columns.records(build, len(offsets))


def read_span(file: Path, offset: int, length: int) -> bytes:
    """A part of a file. Raises DataError."""
    try:
        with file.open("rb") as content:
            content.seek(offset)
            return content.read(length)
    except OSError as error:
        raise DataError(f"{file}: cannot be read any more ({error.strerror}); restore it") from error


def _lines(content: BinaryIO, file: Path, on_error: OnError) -> Iterator[tuple[int, int, bytes]]:
    """Number from 1, offset and content of every line that is not empty; no line is held beyond the bound."""
    offset, number = 0, 0
    while line := content.readline(MAX_LINE_BYTES + 1):
        number += 1
        start, offset = offset, offset + len(line)
        if len(line) > MAX_LINE_BYTES:
            while not line.endswith(b"\n") and (line := content.readline(MAX_LINE_BYTES)):
                offset += len(line)
            on_error(DataError(f"{file}: line {number} is longer than {MAX_LINE_BYTES} bytes; correct or drop it"))
        elif line.strip():
            yield number, start, line


def _record(line: bytes, split: str, number: int, folder: ImageFolder, where: str, look: bool) -> Record:
    """The record of a line. look: at its images, too, which was done when the line was indexed."""
    fields = parse_object(line, where)
    identity = fields.get("id", number)
    name = str(identity) if type(identity) is int else text_of(identity, "id", where)
    scene = fields.get("scene") or {}
    if not isinstance(scene, dict):
        raise DataError(f"{where}: scene is no object; correct or drop the record")
    names = _image_names(fields, where)
    images = tuple(folder.image(n, where) if look else ImageFile(folder.path(n, where)) for n in names)
    return Record(f"{split}/{name}", "jsonl", images, questions_of(fields, where), scene)


def _image_names(fields: Mapping[str, Any], where: str) -> list[Any]:
    if ("image" in fields) == ("images" in fields):
        raise DataError(f"{where}: give either image or images; correct or drop the record")
    names = [fields["image"]] if "image" in fields else fields["images"]
    if not isinstance(names, list) or not 0 < len(names) <= MAX_IMAGES:
        raise DataError(f"{where}: images is no list of 1 to {MAX_IMAGES} paths; correct or drop the record")
    return names
