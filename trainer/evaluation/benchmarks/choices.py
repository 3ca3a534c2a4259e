"""How questions with options become records: options written out, options found in a text, answers checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trainer.data.records import ImageSource
from trainer.evaluation.benchmarks.files import Row
from trainer.evaluation.benchmarks.records import LETTERS, BenchmarkRecord


def lettered(question: str, choices: tuple[str, ...]) -> str:
    """The question with its options on lines of their own."""
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False))])


def split_options(row: Row, text: str, marker: str) -> tuple[str, tuple[str, ...]]:
    """What stands before the options, and their texts. In the pattern `marker`, @ stands for the letter."""
    spans: list[tuple[int, int]] = []
    for letter in LETTERS:
        found = re.compile(marker.replace("@", letter)).search(text, spans[-1][1] if spans else 0)
        if not found:
            break
        spans.append(found.span())
    if len(spans) < 2:
        raise row.error(f"no options in {text[:80]!r}", "give the published file or drop the record")
    ends = [start for start, _ in spans[1:]] + [len(text)]
    choices = tuple(text[start:end].strip(" \n\t;；,") for (_, start), end in zip(spans, ends, strict=True))
    return text[: spans[0][0]].strip(), choices


def letter_record(
    row: Row,
    record_id: str,
    images: tuple[ImageSource, ...],
    question: str,
    choices: tuple[str, ...],
    answer: str | None = None,
    group: str = "",
    category: str = "",
    details: Mapping[str, Any] | None = None,
) -> BenchmarkRecord:
    """A record answered by the letter of an option; `answer` ("B", "(b)") is the row's own if it is not given."""
    letter = (row.text("answer") if answer is None else answer).strip("() ").upper()
    if not images:
        raise row.error("no image", "give the file with embedded images")
    if not 2 <= len(choices) <= len(LETTERS) or letter not in list(LETTERS[: len(choices)]):
        raise row.error(f"answer {letter!r} is none of {len(choices)} options", "correct or drop the record")
    return BenchmarkRecord(record_id, images, question, choices, letter, "letter", group, category, details or {})


def yes_no_record(
    row: Row, record_id: str, image: ImageSource, question: str, answer: str, group: str = "", category: str = ""
) -> BenchmarkRecord:
    """A record answered by yes or no, in whatever case the file has them."""
    if answer.lower() not in ("yes", "no"):
        raise row.error(f"answer {answer!r} is neither yes nor no", "correct or drop the record")
    return BenchmarkRecord(record_id, (image,), question, ("yes", "no"), answer.lower(), "yes_no", group, category)
