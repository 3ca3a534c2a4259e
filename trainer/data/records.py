"""The one record type that every data source gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from shared.errors import DataError
from shared.images import decode_image
from shared.messages import Question

OnError = Callable[[DataError], None]
"""What becomes of a damaged record: raises, or counts it."""

MAX_FILE_BYTES = 64 * 2**20
"""Of an encoded image."""


def raise_error(error: DataError) -> None:
    """The `data.on_error: fail` policy."""
    raise error


@dataclass(frozen=True, slots=True)
class KindQuestion:
    """A question with its kind (count, exist, …), the unit of every per-kind table."""

    kind: str
    text: str
    answer: str

    @property
    def message(self) -> Question:
        """What an anchor is asked."""
        return Question(self.text, self.answer)


class ImageSource(Protocol):
    """Where an encoded image lies: a file of its own, a cell of a table, a member of an archive. `str` names it."""

    def read(self) -> bytes:
        """The encoded image. Raises OSError."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image in a file of its own."""

    path: Path

    def read(self) -> bytes:
        """The file's content. Raises OSError, for more than MAX_FILE_BYTES, too."""
        with self.path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise OSError(f"more than {MAX_FILE_BYTES} bytes")
        return data

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class Auxiliary:
    """An image that makes a record's questions easier (a crop, a drawing, a later view), with what it shows in words.

    It is there in training alone: methods that write visual thoughts learn from it, and no prompt ever holds it.
    """

    image: ImageSource
    description: str


@dataclass(frozen=True, slots=True)
class Record:
    """One or more images with questions about all of them together. Images stay where they lie until they are read."""

    record_id: str
    source: str
    images: tuple[ImageSource, ...]
    questions: tuple[KindQuestion, ...]
    scene: Mapping[str, Any] = field(default_factory=dict)
    auxiliary: Auxiliary | None = None

    @property
    def where(self) -> str:
        """The images' names, for messages."""
        return ", ".join(str(image) for image in self.images)

    def image_bytes(self) -> list[bytes]:
        """The encoded images. Raises DataError naming image and record."""
        return [self._read(image) for image in self.images]

    def load_images(self, encoded: Sequence[bytes] | None = None) -> list[Image.Image]:
        """The images as RGB, read, or from what `image_bytes` gave. Raises DataError naming image and record."""
        encoded = self.image_bytes() if encoded is None else encoded
        return [self._decode(image, data) for image, data in zip(self.images, encoded, strict=True)]

    def _read(self, source: ImageSource) -> bytes:
        try:
            return source.read()
        except OSError as error:
            raise self._unreadable(source, error) from error

    def _decode(self, source: ImageSource, data: bytes) -> Image.Image:
        try:
            return decode_image(data)
        except DataError as error:
            raise self._unreadable(source, error) from error

    def _unreadable(self, source: ImageSource, error: Exception) -> DataError:
        return DataError(
            f"{source}: image of record {self.record_id} cannot be read "
            f"({' '.join(str(error).split())}); replace the file, or set data.on_error: skip"
        )
