"""Unit tests use models so small that a second thread costs more than it gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from shared.messages import Question
from trainer.data.records import ImageFile, KindQuestion, Record

torch.set_num_threads(1)


@pytest.fixture
def picture_records(pictures: list[Image.Image], questions: list[list[Question]], tmp_path: Path) -> list[Record]:
    """The pictures as files, with their questions."""
    records = []
    for i, (picture, row) in enumerate(zip(pictures, questions, strict=True)):
        file = ImageFile(tmp_path / f"{i}.png")
        picture.save(file.path)
        records.append(Record(str(i), "test", (file,), tuple(KindQuestion("any", q.text, q.answer) for q in row)))
    return records
