"""Reader of the CLEVR v1.0 folder format (Johnson et al. 2017), for real CLEVR and for the toy world.

    ROOT/images/SPLIT/*.png
    ROOT/questions/CLEVR_SPLIT_questions.json
    ROOT/scenes/CLEVR_SPLIT_scenes.json

Takes the published files ("yes"/"no" and digit strings, programs with `function`) and the official generator's
own output (booleans and integers, programs with `type`).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from shared.errors import DataError
from trainer.data.records import ImageFile, KindQuestion, Record

_KIND_OF_FUNCTION = {
    "count": "count",
    "exist": "exist",
    "equal_integer": "compare_integer",
    "less_than": "compare_integer",
    "greater_than": "compare_integer",
}

OnError = Callable[[DataError], None]


def raise_error(error: DataError) -> None:
    """The `data.on_error: fail` policy."""
    raise error


def load_clevr(root: Path, split: str, on_error: OnError = raise_error, check_images: bool = True) -> list[Record]:
    """Records of one split, ordered by image index.

    Damaged records go to `on_error`, which raises or counts them; a missing file always raises DataError.
    """
    questions_file = root / "questions" / f"CLEVR_{split}_questions.json"
    scenes_file = root / "scenes" / f"CLEVR_{split}_scenes.json"
    scenes = {scene.get("image_filename"): scene for scene in _read(scenes_file, "scenes")}
    by_image: dict[str, list[KindQuestion]] = defaultdict(list)
    index_of: dict[str, int] = {}
    for position, entry in enumerate(_read(questions_file, "questions")):
        try:
            filename, question = _question(entry, f"{questions_file}: question {position}")
        except DataError as error:
            on_error(error)
            continue
        by_image[filename].append(question)
        index_of[filename] = int(entry.get("image_index", position))

    records = []
    for filename in sorted(by_image, key=lambda name: (index_of[name], name)):
        image = ImageFile(root / "images" / split / filename)
        try:
            _check_scene(filename, scenes, questions_file, scenes_file)
            if check_images:
                _check_image(image.path)
        except DataError as error:
            on_error(error)
            continue
        record_id = f"{split}/{Path(filename).stem}"
        records.append(Record(record_id, "clevr", (image,), tuple(by_image[filename]), scenes[filename]))
    if not records:
        raise DataError(f"{questions_file}: no usable record; check data.path and data.split names")
    return records


def _read(file: Path, key: str) -> list[dict[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        entries = content[key]
    except FileNotFoundError as error:
        raise DataError(f"{file}: missing; data.path must name a folder in the CLEVR v1.0 layout") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{file}: no JSON with a list {key!r} ({error}); copy the file again") from error
    return list(entries)


def _question(entry: dict[str, Any], where: str) -> tuple[str, KindQuestion]:
    missing = [key for key in ("image_filename", "question", "answer") if key not in entry]
    if missing:
        raise DataError(f"{where}: no {', '.join(missing)}; test-split files without answers cannot be used")
    text, answer = str(entry["question"]).strip(), _answer_text(entry["answer"])
    if not text:
        raise DataError(f"{where}: the question is empty; correct or drop the record")
    if not answer:
        raise DataError(f"{where}: the answer is empty; correct or drop the record")
    kind = str(entry.get("question_kind") or _kind_of_program(entry.get("program") or []))
    return str(entry["image_filename"]), KindQuestion(kind, text, answer)


def _answer_text(answer: Any) -> str:
    if isinstance(answer, bool):
        return "yes" if answer else "no"
    return str(answer).strip()


def _kind_of_program(program: list[dict[str, Any]]) -> str:
    """CLEVR's five kinds: query, count, exist, compare_integer, compare_attribute."""
    if not program:
        return "unknown"
    function = str(program[-1].get("function") or program[-1].get("type") or "unknown")
    if function in _KIND_OF_FUNCTION:
        return _KIND_OF_FUNCTION[function]
    for prefix, kind in (("query_", "query"), ("equal_", "compare_attribute")):
        if function.startswith(prefix):
            return kind
    return "unknown"


def _check_scene(filename: str, scenes: dict[Any, Any], questions_file: Path, scenes_file: Path) -> None:
    if filename not in scenes:
        raise DataError(
            f"{scenes_file}: no scene for {filename}, which {questions_file.name} asks about; "
            "the two files are of different data sets or one is cut short"
        )


def _check_image(path: Path) -> None:
    """The header must be that of an image; pixels are checked when they are loaded."""
    try:
        with Image.open(path):
            pass
    except FileNotFoundError as error:
        raise DataError(f"{path}: image is missing; restore the file, or set data.on_error: skip") from error
    except OSError as error:
        raise DataError(f"{path}: not an image; replace the file, or set data.on_error: skip") from error
