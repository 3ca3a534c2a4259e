"""The one record type that every data source gives."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from shared.errors import DataError
from shared.messages import Question


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


@dataclass(frozen=True, slots=True)
class Record:
    """One image with its questions. The image stays on disk until `load_image`."""

    record_id: str
    source: str
    image_path: Path
    questions: tuple[KindQuestion, ...]
    scene: Mapping[str, Any] = field(default_factory=dict)

    def image_bytes(self) -> bytes:
        """The image's file. Raises DataError naming file and record."""
        try:
            return self.image_path.read_bytes()
        except OSError as error:
            raise self._unreadable(error) from error

    def load_image(self, image_bytes: bytes | None = None) -> Image.Image:
        """The image as RGB, from its file or from what `image_bytes` gave. Raises DataError naming file and record."""
        try:
            with Image.open(self.image_path if image_bytes is None else io.BytesIO(image_bytes)) as image:
                return image.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(
            f"{self.image_path}: image of record {self.record_id} cannot be read "
            f"({' '.join(str(error).split())}); replace the file, or set data.on_error: skip"
        )
