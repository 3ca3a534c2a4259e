"""Values from files that others wrote, checked: texts, answers, paths of images. Everything here is outside input."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from shared.config import Section
from shared.errors import DataError
from shared.images import check_header
from trainer.data.records import ImageFile, KindQuestion

MAX_TEXT_CHARS = 20_000
MAX_IMAGES = 64
MAX_QUESTIONS = 10_000
UNKNOWN_KIND = "unknown"


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object. Raises DataError."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: no valid JSON ({' '.join(str(error).split())}); correct or drop it") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: not a JSON object; correct or drop it")
    return value


def text_of(value: Any, what: str, where: str) -> str:
    """A text without surrounding space. Raises DataError if it is none, empty, too long or no Unicode."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} is no text; correct or drop the record")
    text = value.strip()
    if not text:
        raise DataError(f"{where}: the {what} is empty; correct or drop the record")
    if len(text) > MAX_TEXT_CHARS:
        raise DataError(f"{where}: the {what} has {len(text)} characters, more than {MAX_TEXT_CHARS}; correct it")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell and no tokenizer takes
        raise DataError(f"{where}: the {what} is no valid Unicode; correct or drop the record") from error
    return text


def answer_of(value: Any, where: str) -> str:
    """An answer as text: booleans as yes and no, numbers as digits. Raises DataError for all else, NaN included."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value):
            raise DataError(f"{where}: the answer is {value}; correct or drop the record")
        value = int(value) if value.is_integer() else value
    return text_of(str(value) if isinstance(value, int | float) else value, "answer", where)


def question_of(fields: Any, where: str, default_kind: str = UNKNOWN_KIND) -> KindQuestion:
    """A question from an object with `question`, `answer` and perhaps `kind`. Raises DataError."""
    if not isinstance(fields, Mapping):
        raise DataError(f"{where}: not a JSON object; correct or drop the record")
    missing = [key for key in ("question", "answer") if fields.get(key) is None]
    if missing:
        raise DataError(f"{where}: no {', '.join(missing)}; test-split files without answers cannot be used")
    kind = fields.get("kind")
    return KindQuestion(
        default_kind if kind is None else text_of(kind, "kind", where),
        text_of(fields["question"], "question", where),
        answer_of(fields["answer"], where),
    )


def questions_of(fields: Mapping[str, Any], where: str) -> tuple[KindQuestion, ...]:
    """All questions of a record: its list `questions`, or its one `question` and `answer`. Raises DataError."""
    if "questions" not in fields:
        return (question_of(fields, where),)
    entries = fields["questions"]
    if "question" in fields or "answer" in fields:
        raise DataError(f"{where}: both questions and a single question; keep one of them")
    if not isinstance(entries, list) or not 0 < len(entries) <= MAX_QUESTIONS:
        raise DataError(f"{where}: questions is no list of 1 to {MAX_QUESTIONS} objects; correct or drop the record")
    return tuple(question_of(entry, f"{where}, question {n}") for n, entry in enumerate(entries))


class ImageFolder:
    """Finds images below a folder, and nothing outside of it: no absolute path, no `..`, no link that leads out."""

    def __init__(self, root: Path):
        self.root = root
        self._real_root = os.path.realpath(root)
        self._inside: dict[str, bool] = {}

    def image(self, relative: Any, where: str, look: bool) -> ImageFile:
        """An image that lies there. Raises DataError if the path leads out.

        look: whether there is an image, too; only its header is read.
        """
        path = self.path(relative, where)
        try:
            is_link = stat.S_ISLNK(os.lstat(path).st_mode)
        except OSError:
            is_link = False  # missing: seen below, or when the image is read
        if not self._is_inside(os.path.realpath(path) if is_link else path):
            raise DataError(f"{where}: image {relative!r} is a link out of {self.root}; put the file itself there")
        if look:
            _look_at(path, where)
        return ImageFile(path)

    def path(self, relative: Any, where: str) -> Path:
        """The path by its text alone. Raises DataError if that leads out of the folder."""
        name = text_of(relative, "image path", where)
        if "\0" in name or name.startswith("/") or ".." in name.split("/") or "\\" in name:
            raise DataError(f"{where}: image {name!r} leads out of {self.root}; name it relative to that folder")
        return self.root / name

    def _is_inside(self, path: str | Path) -> bool:
        """Whether the file's folder, links followed, lies in the root; each folder is looked up once."""
        parent = os.path.dirname(path)  # noqa: PTH120 - once per record
        if parent not in self._inside:
            real = os.path.realpath(parent)
            self._inside[parent] = os.path.commonpath([real, self._real_root]) == self._real_root
        return self._inside[parent]


def _look_at(path: Path, where: str) -> None:
    remedy = "or set data.on_error: skip"
    try:
        check_header(path)
    except FileNotFoundError as error:
        other = _other_case(path)
        raise DataError(f"{path}: image is missing{other}; restore the file that {where} names, {remedy}") from error
    except DataError as error:
        raise DataError(f"{path}: not an image; replace the file that {where} names, {remedy} ({error})") from error


def _other_case(path: Path) -> str:
    """A hint, if a file lies there whose name differs in letter case alone."""
    try:
        names = [name for name in os.listdir(path.parent) if name.lower() == path.name.lower()]  # noqa: PTH208
    except OSError:
        return ""
    return f", but {names[0]} is there: names must agree in letter case" if names else ""


class FileOptions(Section):
    """Options of sources whose images lie in files of their own."""

    check_images: bool = Field(
        True, description="Open every image's header at the start; without, damage is found when an image is drawn."
    )


DEFAULT_OPTIONS = FileOptions()
