"""Reader of TallyQA (Acharya et al. 2019): SPLIT.json (train, test) and the images that it names.

    ROOT/train.json                 [{"image": "VG_100K_2/2410408.jpg", "question": …, "answer": 4, "issimple": false,
                                      "question_id": …, "image_id": …, "data_source": …}, …]
    ROOT/VG_100K/, ROOT/VG_100K_2/  of Visual Genome
    ROOT/train2014/, ROOT/val2014/  of COCO

Checked: the fields, against manoja328/TallyQA_dataset, README. Not verified: whether every record of the training file
has `issimple`; one without is of the kind `unknown`. The published files have no validation split: name one of yours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import DataError
from trainer.data.fields import DEFAULT_OPTIONS, UNKNOWN_KIND, FileOptions, ImageFolder, question_of, text_of
from trainer.data.index import QuestionColumns, Records
from trainer.data.records import KindQuestion, OnError, Record, raise_error
from trainer.data.spans import Spans, counted, json_entries


def load_tallyqa(
    root: Path, split: str, on_error: OnError = raise_error, options: FileOptions = DEFAULT_OPTIONS
) -> Records:
    """Records of one split, one per image, ordered by first question; they stay in the file until they are asked for.

    Damaged records go to `on_error`, which raises or counts them; a missing file always raises DataError.
    """
    file = root / f"{split}.json"
    folder, columns, spans = ImageFolder(root), QuestionColumns(), Spans([file])
    image_of: dict[str, int] = {}
    seen: set[int] = set()
    for span in json_entries(file, None, "record", on_error):
        try:
            image, question = count_question(span.fields, span.where)
        except DataError as error:
            on_error(error)
            continue
        identity = span.fields.get("question_id")
        if identity is not None and hash(str(identity)) in seen:
            on_error(DataError(f"{span.where}: question_id {identity!r} is used twice; drop one of them"))
            continue
        seen.add(hash(str(identity)))
        columns.append(image_of.setdefault(image, len(image_of)), question)
        spans.append(0, span)
    good = []
    for image, n in counted(image_of.items(), f"looking at images of {split}", len(image_of)):
        try:
            folder.image(image, f"a record of {file}", options.check_images)
        except DataError as error:
            on_error(error)
            continue
        good.append(n)
    if not good:
        raise DataError(f"{file}: no usable record; check data.path and data.split names")

    def build(_n: int, numbers: np.ndarray) -> Record:
        asked = [count_question(fields, str(file)) for fields in spans.read(*numbers)]
        image = folder.image(asked[0][0], str(file), look=False)
        return Record(f"{split}/{Path(asked[0][0]).with_suffix('')}", "tallyqa", (image,), tuple(q for _, q in asked))

    return columns.records(build, len(image_of)).take(np.array(good))


def count_question(fields: Mapping[str, Any], where: str) -> tuple[str, KindQuestion]:
    """The image's path, and the question, simple or complex. Raises DataError if the answer is no count."""
    is_simple = fields.get("issimple")
    if is_simple not in (True, False, None):
        raise DataError(f"{where}: issimple is {is_simple!r}, not true or false; correct the record")
    kind = UNKNOWN_KIND if is_simple is None else "simple" if is_simple else "complex"
    question = question_of({**fields, "kind": kind}, where)
    if not question.answer.isdecimal():
        raise DataError(f"{where}: answer {question.answer!r} is no count; correct the record")
    return text_of(fields.get("image"), "image", where), question
