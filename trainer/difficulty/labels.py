"""Label files: written in parts, so that a job that was killed goes on with what is left.

    LABELS/labels.json          what was labelled, by what, how; whether all of it is done
    LABELS/part-000000.jsonl    one line per question: record, question, answer, right, samples, answers

A part is written under another name, synced and renamed, and holds whole records: what exists is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from shared.errors import ConfigError, DataError
from trainer.data.records import Record

_HEADER = "labels.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Difficulty:
    """Of `samples` answers of the base model, `right` were exactly right."""

    right: int
    samples: int


def load_difficulty(folder: Path) -> dict[tuple[str, str], Difficulty]:
    """Labels by (record id, question text). Raises DataError if they are damaged or the job is not finished."""
    header = _read_header(folder)
    if not header["complete"]:
        raise DataError(f"{folder}: the labels are not complete; run the same `python -m trainer difficulty` again")
    return {
        (row["record"], row["question"]): Difficulty(int(row["right"]), int(row["samples"])) for row in _rows(folder)
    }


class LabelFolder:
    """Labels that are being written. One process writes a folder."""

    def __init__(self, folder: Path, settings: dict[str, Any], about: dict[str, str] | None = None):
        """Start a folder, or go on with one. Raises ConfigError if its labels were made with other settings.

        about: names for people, which may change when folders are moved.
        """
        self._folder = folder
        settings = {"format": _FORMAT, **settings}
        self._header = {**settings, "about": about or {}}
        if (folder / _HEADER).exists():
            found = _read_header(folder)
            for name, value in settings.items():
                if found.get(name) != value:
                    raise ConfigError(
                        f"{folder}: holds labels with {name} {found.get(name)!r}, not {value!r}; give another --to"
                    )
            self._is_complete = bool(found["complete"])
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._is_complete = False
            self._write_header()

    def rows(self) -> list[dict[str, Any]]:
        """All lines written so far. Raises DataError for a damaged part."""
        return list(_rows(self._folder))

    def write_part(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add lines, whole records of them."""
        numbers = [int(part.stem.removeprefix("part-")) for part in _parts(self._folder)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        _write(self._folder / f"part-{max(numbers, default=-1) + 1:06d}.jsonl", text)

    def finish(self) -> None:
        """Mark the labels as complete."""
        self._is_complete = True
        self._write_header()

    def _write_header(self) -> None:
        _write(self._folder / _HEADER, json.dumps({**self._header, "complete": self._is_complete}, indent=2) + "\n")


def data_digest(records: Iterable[Record]) -> str:
    """SHA-256 of ids, encoded images, questions and answers. Reads every image once."""
    digest = hashlib.sha256()
    for record in records:
        questions = [(question.text, question.answer) for question in record.questions]
        images = [hashlib.sha256(data).hexdigest() for data in record.image_bytes()]
        digest.update(json.dumps([record.record_id, images, questions]).encode())
    return digest.hexdigest()


def model_digest(path: str) -> str:
    """SHA-256 of a model's files: config, weights, tokenizer, processor, template."""
    config = cached_file(path, "config.json")
    digest = hashlib.sha256()
    for file in sorted(Path(str(config)).parent.iterdir()):
        if file.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt"):
            with file.open("rb") as content:
                digest.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _read_header(folder: Path) -> dict[str, Any]:
    try:
        header = json.loads((folder / _HEADER).read_text(encoding="utf-8"))
        header["complete"]
    except FileNotFoundError as error:
        raise DataError(f"{folder}: no difficulty labels; write them: python -m trainer difficulty") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / _HEADER}: damaged ({error}); delete the folder and label again") from error
    return dict(header)


def _parts(folder: Path) -> Sequence[Path]:
    return sorted(folder.glob("part-*.jsonl"))


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    for part in _parts(folder):
        for number, line in enumerate(part.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                row["record"], row["question"], row["right"], row["samples"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{part}, line {number}: no label ({error}); delete this part and run the same job again"
                ) from error
            yield row


def _write(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("w", encoding="utf-8") as output:
        output.write(text)
        output.flush()
        os.fsync(output.fileno())
    partial.replace(file)
