"""Any data set as one JSON object per line, with images in files.

    ROOT/SPLIT.jsonl
    {"id": "7", "images": ["a/7.png"], "questions": [{"question": "…", "answer": "…", "kind": "count"}], "scene": {}}

id: by default the line's number. images: relative to ROOT, one or more; `image` for a single one. questions: with text,
number or boolean answers and a kind (default: unknown); `question`, `answer`, `kind` for a single one. scene: optional
labels, any object. auxiliary: optional, {"image": "a/7_zoom.png", "description": "…"}: an image relative to ROOT that
makes the questions easier, for methods that learn to imagine it, and what it shows in words. Other fields are ignored,
so are empty lines.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import DataError
from trainer.data.fields import DEFAULT_OPTIONS, MAX_IMAGES, FileOptions, ImageFolder, questions_of, text_of
from trainer.data.index import QuestionColumns, Records
from trainer.data.records import Auxiliary, OnError, Record, raise_error
from trainer.data.spans import Spans, json_lines


def load_jsonl(
    root: Path, split: str, on_error: OnError = raise_error, options: FileOptions = DEFAULT_OPTIONS
) -> Records:
    """Records of one split in the order of the lines; each stays in the file until it is asked for.

    Damaged lines go to `on_error`, which raises or counts them; a missing file always raises DataError.
    """
    file = root / f"{split}.jsonl"
    folder, columns, spans = ImageFolder(root), QuestionColumns(), Spans([file])
    numbers = array("i")
    seen: set[int] = set()
    for span in json_lines(file, on_error):
        try:
            record = record_of(span.fields, split, span.name, folder, span.where, options.check_images)
        except DataError as error:
            on_error(error)
            continue
        if hash(record.record_id) in seen:
            on_error(DataError(f"{span.where}: id {record.record_id!r} is used twice; rename one"))
            continue
        seen.add(hash(record.record_id))
        for question in record.questions:
            columns.append(len(spans), question)
        numbers.append(int(span.name))
        spans.append(0, span)
    if not numbers:
        raise DataError(f"{file}: no usable record; check data.path and data.split names")

    def build(n: int, _questions: np.ndarray) -> Record:
        number = str(numbers[n])
        (fields,) = spans.read(n)
        return record_of(fields, split, number, folder, f"{file}: line {number}", look=False)

    return columns.records(build, len(spans))


def record_of(
    fields: Mapping[str, Any], split: str, default_id: str, folder: ImageFolder, where: str, look: bool
) -> Record:
    """The record of a line. look: at the headers of its images. Raises DataError."""
    images = tuple(folder.image(name, where, look) for name in _image_names(fields, where))
    record_id = f"{split}/{identity_of(fields, default_id, where)}"
    auxiliary = _auxiliary(fields, folder, where, look)
    return Record(record_id, "jsonl", images, questions_of(fields, where), scene_of(fields, where), auxiliary)


def identity_of(fields: Mapping[str, Any], default: str, where: str) -> str:
    """The field `id`, a text or an integer. Raises DataError."""
    identity = fields.get("id", default)
    return str(identity) if type(identity) is int else text_of(identity, "id", where)


def scene_of(fields: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The field `scene`, an object, or an empty one. Raises DataError."""
    scene = fields.get("scene") or {}
    if not isinstance(scene, dict):
        raise DataError(f"{where}: scene is no object; correct or drop the record")
    return scene


def _image_names(fields: Mapping[str, Any], where: str) -> list[Any]:
    if ("image" in fields) == ("images" in fields):
        raise DataError(f"{where}: give either image or images; correct or drop the record")
    names = [fields["image"]] if "image" in fields else fields["images"]
    if not isinstance(names, list) or not 0 < len(names) <= MAX_IMAGES:
        raise DataError(f"{where}: images is no list of 1 to {MAX_IMAGES} paths; correct or drop the record")
    return names


def _auxiliary(fields: Mapping[str, Any], folder: ImageFolder, where: str, look: bool) -> Auxiliary | None:
    """The field `auxiliary`, if it is there."""
    auxiliary = fields.get("auxiliary")
    if auxiliary is None:
        return None
    if not isinstance(auxiliary, dict):
        raise DataError(f"{where}: auxiliary is no object with image and description; correct or drop the record")
    image = folder.image(auxiliary.get("image"), f"{where}, auxiliary", look)
    return Auxiliary(image, text_of(auxiliary.get("description"), "description", f"{where}, auxiliary"))
