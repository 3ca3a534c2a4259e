"""Reader of the CLEVR v1.0 folder format (Johnson et al. 2017), for real CLEVR and for the toy world.

    ROOT/images/SPLIT/*.png
    ROOT/questions/CLEVR_SPLIT_questions.json
    ROOT/scenes/CLEVR_SPLIT_scenes.json

Takes the published files ("yes"/"no" and digit strings, programs with `function`) and the official generator's
own output (booleans and integers, programs with `type`).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import DataError
from trainer.data.fields import DEFAULT_OPTIONS, UNKNOWN_KIND, FileOptions, ImageFolder, question_of, text_of
from trainer.data.index import QuestionColumns, Records
from trainer.data.records import KindQuestion, OnError, Record, raise_error
from trainer.data.spans import Spans, counted, json_entries

_KIND_OF_FUNCTION = {
    "count": "count",
    "exist": "exist",
    "equal_integer": "compare_integer",
    "less_than": "compare_integer",
    "greater_than": "compare_integer",
}


def load_clevr(
    root: Path, split: str, on_error: OnError = raise_error, options: FileOptions = DEFAULT_OPTIONS
) -> Records:
    """Records of one split, ordered by image index; they stay in the files until they are asked for.

    Damaged records go to `on_error`, which raises or counts them; a missing file always raises DataError.
    """
    questions_file = root / "questions" / f"CLEVR_{split}_questions.json"
    scenes_file = root / "scenes" / f"CLEVR_{split}_scenes.json"
    folder, columns = ImageFolder(root / "images" / split), QuestionColumns()
    questions, scenes = Spans([questions_file]), Spans([scenes_file])
    image_of: dict[str, int] = {}
    indices = array("q")
    seen: set[str | int] = set()
    for number, span in enumerate(json_entries(questions_file, "questions", "question", on_error)):
        try:
            filename, question = _question(span.fields, span.where)
            _check_index(span.fields.get("question_index"), seen, span.where)
        except DataError as error:
            on_error(error)
            continue
        image = image_of.setdefault(filename, len(image_of))
        if image == len(indices):
            index = span.fields.get("image_index")
            indices.append(index if type(index) is int else number)
        columns.append(image, question)
        questions.append(0, span)
    if not image_of:
        raise DataError(f"{questions_file}: no usable record; check data.path and data.split names")
    scene_of: dict[str, int] = {}
    for span in json_entries(scenes_file, "scenes", "scene", on_error):
        filename = str(span.fields.get("image_filename"))
        if filename in scene_of:
            on_error(DataError(f"{span.where}: a second scene for {filename}; drop one of them"))
            continue
        scene_of[filename] = len(scenes)
        scenes.append(0, span)

    good, scene_N = [], np.zeros(len(image_of), dtype=np.int32)
    in_order = sorted(image_of, key=lambda name: (indices[image_of[name]], name))
    for filename in counted(in_order, f"looking at images of {split}", len(in_order)):
        image = image_of[filename]
        try:
            _check_scene(filename, scene_of, questions_file, scenes_file)
            folder.image(filename, f"a question of {questions_file}", options.check_images)
        except DataError as error:
            on_error(error)
            continue
        scene_N[image] = scene_of[filename]
        good.append(image)
    if not good:
        raise DataError(f"{questions_file}: no usable record; check data.path and data.split names")

    def build(n: int, numbers: np.ndarray) -> Record:
        asked = [_question(fields, str(questions_file)) for fields in questions.read(*numbers)]
        filename = asked[0][0]
        image = folder.image(filename, str(questions_file), look=False)
        record_id = f"{split}/{Path(filename).stem}"
        (scene,) = scenes.read(scene_N[n])
        return Record(record_id, "clevr", (image,), tuple(q for _, q in asked), scene)

    return columns.records(build, len(image_of)).take(np.array(good))


def _question(entry: Mapping[str, Any], where: str) -> tuple[str, KindQuestion]:
    """The image's name, and the question."""
    if "image_filename" not in entry:
        raise DataError(f"{where}: no image_filename; correct or drop the record")
    kind = entry.get("question_kind") or _kind_of_program(entry.get("program"))
    return text_of(entry["image_filename"], "image_filename", where), question_of({**entry, "kind": kind}, where)


def _check_index(index: Any, seen: set[str | int], where: str) -> None:
    """Note a `question_index`, which not every file has. Raises DataError if it was there before."""
    if index is None:
        return
    if not isinstance(index, int | str):
        raise DataError(f"{where}: question_index is no number; correct or drop the record")
    if index in seen:
        raise DataError(f"{where}: question_index {index!r} is used twice; drop one of them")
    seen.add(index)


def _kind_of_program(program: Any) -> str:
    """CLEVR's five kinds: query, count, exist, compare_integer, compare_attribute."""
    last = program[-1] if isinstance(program, list) and program else {}
    function = str(last.get("function") or last.get("type")) if isinstance(last, dict) else ""
    if function in _KIND_OF_FUNCTION:
        return _KIND_OF_FUNCTION[function]
    for prefix, kind in (("query_", "query"), ("equal_", "compare_attribute")):
        if function.startswith(prefix):
            return kind
    return UNKNOWN_KIND


def _check_scene(filename: str, scenes: Mapping[str, int], questions_file: Path, scenes_file: Path) -> None:
    if filename not in scenes:
        raise DataError(
            f"{scenes_file}: no scene for {filename}, which {questions_file.name} asks about; "
            "the two files are of different data sets or one is cut short"
        )
