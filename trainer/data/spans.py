"""JSON objects of large files: found in one pass that holds one object at a time, and read again by their offset."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import Progress

from shared.errors import DataError
from trainer.data.fields import parse_object
from trainer.data.records import OnError

MAX_OBJECT_BYTES = 16 * 2**20
_CHUNK_BYTES = 2**20
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Span:
    """One object, the key or number under which it stands, where it begins, how long it is. where: for messages."""

    name: str
    offset: int
    length: int
    fields: dict[str, Any]
    where: str


class Spans:
    """Places of objects in some files: 14 bytes for each. Safe to read from any thread."""

    def __init__(self, files: Sequence[Path]):
        self._files = files
        self._file, self._offset, self._length = array("h"), array("q"), array("i")

    def __len__(self) -> int:
        return len(self._offset)

    def append(self, file: int, span: Span) -> None:
        """Add an object of the file with this number."""
        self._file.append(file)
        self._offset.append(span.offset)
        self._length.append(span.length)

    def read(self, *numbers: int) -> list[dict[str, Any]]:
        """Objects, from their files. Raises DataError."""
        objects = []
        for number, group in groupby(numbers, key=lambda n: self._file[n]):
            path = self._files[number]
            try:
                with path.open("rb") as file:
                    for n in group:
                        file.seek(self._offset[n])
                        where = f"{path}: byte {self._offset[n]}"
                        objects.append(parse_object(file.read(self._length[n]), where))
            except OSError as error:
                raise DataError(f"{path}: cannot be read any more ({error.strerror}); restore it") from error
        return objects


def json_lines(path: Path, on_error: OnError) -> Iterator[Span]:
    """Objects of a file with one per line; `name` counts lines from 1, empty ones included. Raises DataError."""
    with _opened(path) as (file, show):
        offset, number = 0, 0
        while line := file.readline(MAX_OBJECT_BYTES + 1):
            number += 1
            where = f"{path}: line {number}"
            start, offset = offset, offset + len(line)
            show(offset)
            if len(line) > MAX_OBJECT_BYTES:
                while not line.endswith(b"\n") and (line := file.readline(_CHUNK_BYTES)):
                    offset += len(line)
                    show(offset)
                on_error(DataError(f"{where} is longer than {MAX_OBJECT_BYTES} bytes; correct or drop it"))
            elif line.strip():
                try:
                    fields = parse_object(line, where)
                except DataError as error:
                    on_error(error)
                    continue
                yield Span(str(number), start, len(line), fields, where)


def json_entries(path: Path, key: str | None, what: str, on_error: OnError) -> Iterator[Span]:
    """Objects in a file's list or object: the top one, or that under `key`. what: a word for one, for messages.

    What is no JSON raises DataError; an entry that is no object or no UTF-8 goes to `on_error`.
    """
    with _opened(path) as (file, show):
        text = _Text(file, path, show)
        if key is not None:
            text.find_key(key)
        opening = text.symbol("{[")
        for number in text.items(opening):
            name = text.key() if opening == "{" else str(number)
            where = f"{path}: {what} {name}"
            offset, value, content = text.value()
            try:
                # The text is read as Latin-1, so that characters are bytes; what is more than ASCII is read again.
                is_sound = content.isascii() and isinstance(value, dict)
                fields = value if is_sound else parse_object(content.encode("latin-1"), where)
            except DataError as error:
                on_error(error)
                continue
            yield Span(name, offset, len(content), fields, where)


class _Text:
    """A JSON file as text of one character per byte, of which a window is held."""

    def __init__(self, file: BinaryIO, path: Path, show: Callable[[int], None]):
        self._file, self._path, self._show = file, path, show
        self._window, self._window_offset, self._at = "", 0, 0

    def symbol(self, expected: str) -> str:
        """The next character that is no space, which must be one of these."""
        found = self._peek()
        if not found or found not in expected:
            raise self._error(f"{' or '.join(expected)} is missing")
        self._at += 1
        return found

    def items(self, opening: str) -> Iterator[int]:
        """Counts entries, each of which is read between two steps, to the end of the list or object."""
        closing = "}" if opening == "{" else "]"
        if self._peek() == closing:
            self._at += 1
            return
        number = 0
        while True:
            yield number
            number += 1
            if self.symbol("," + closing) == closing:
                return

    def find_key(self, key: str) -> None:
        """Go to the value of a key of the top object."""
        opening = self.symbol("{")
        for _ in self.items(opening):
            if self.key() == key:
                return
            self.value()
        raise self._error(f"no key {key!r}")

    def key(self) -> str:
        _, key, content = self.value()
        if not isinstance(key, str):
            raise self._error("a key is no text")
        self.symbol(":")
        return key if content.isascii() else content.encode("latin-1").decode("utf-8", "replace").strip('"')

    def value(self) -> tuple[int, Any, str]:
        """Offset, value and text of the next value."""
        self._peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._window, self._at)
            except (ValueError, RecursionError) as error:
                if len(self._window) - self._at > MAX_OBJECT_BYTES or not self._more():
                    raise self._error(str(error)) from error
                continue
            if end == len(self._window) and self._more():
                continue  # a number may go on
            start, self._at = self._at, end
            return self._window_offset + start, value, self._window[start:end]

    def _peek(self) -> str:
        while True:
            match = _SPACE.match(self._window, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._window):
                return self._window[self._at]
            if not self._more():
                return ""

    def _more(self) -> bool:
        """Read on; what was passed is dropped. The more is held, the more is added, so that retries stay few."""
        added = self._file.read(max(_CHUNK_BYTES, len(self._window) - self._at))
        self._window = self._window[self._at :] + added.decode("latin-1")
        self._window_offset, self._at = self._window_offset + self._at, 0
        self._show(self._window_offset)
        return bool(added)

    def _error(self, problem: str) -> DataError:
        place = self._window_offset + self._at
        return DataError(f"{self._path}: no valid JSON at byte {place} ({problem}); copy the file again")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, Callable[[int], None]]]:
    """The file, and a progress bar for its bytes."""
    try:
        file = path.open("rb")
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check data.path and data.split names") from error
    with file, progress_bar(f"reading {path.name}", size) as show:
        yield file, show


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, if that is a terminal; the function takes what is done, as often as one likes."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        step, shown = max(1, total // 200), 0

        def show(done: int) -> None:
            nonlocal shown
            if done - shown >= step:
                shown = done
                bar.update(task, completed=done)

        yield show


def counted(items: Iterable[Any], title: str, total: int) -> Iterator[Any]:
    """The items, with a progress bar."""
    with progress_bar(title, total) as show:
        for done, item in enumerate(items):
            yield item
            show(done)
