"""Reader of GQA (Hudson & Manning 2019), as the authors publish it and as the hub holds it (lmms-lab/GQA).

    ROOT/images/ID.jpg
    ROOT/[questions1.2/]SPLIT_balanced_questions.json      {"QUESTION_ID": {…}, …}, and SPLIT_all_questions.json or
    ROOT/[questions1.2/]train_all_questions/train_all_questions_{0..9}.json
    ROOT/[sceneGraphs/]SPLIT_sceneGraphs.json              optional; {"IMAGE_ID": {…}, …}

    ROOT/SPLIT_balanced_instructions/SPLIT-*.parquet       the same fields; so for all
    ROOT/SPLIT_balanced_images/SPLIT-*.parquet             id, image

Fields of a question: imageId, question, answer, types {structural, semantic, detailed}, and others that are not read.
Checked: names of files and folders, fields of both layouts, against public code that reads them. Not verified: whether
ids repeat among the ten files of train_all_questions; they are refused.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from shared.errors import DataError
from trainer.data.fields import FileOptions, ImageFolder, question_of, text_of
from trainer.data.index import QuestionColumns, Records
from trainer.data.records import KindQuestion, OnError, Record, raise_error
from trainer.data.spans import Spans, counted, json_entries
from trainer.data.tables import ParquetFiles, split_files

TypeName = Literal["structural", "semantic", "detailed"]


class GqaOptions(FileOptions):
    """Options of source gqa."""

    questions: Literal["balanced", "all"] = "balanced"
    kinds: TypeName = Field("structural", description="Which of a question's types is its kind.")


_DEFAULTS = GqaOptions()


def load_gqa(root: Path, split: str, on_error: OnError = raise_error, options: GqaOptions = _DEFAULTS) -> Records:
    """Records of one split, one per image, ordered by first question; they stay in the files until they are asked for.

    Damaged records go to `on_error`, which raises or counts them; a missing file always raises DataError.
    """
    if (root / f"{split}_{options.questions}_instructions").is_dir():
        return _load_hub(root, split, on_error, options)
    files = _question_files(root, split, options.questions)
    graphs_files = [root / folder / f"{split}_sceneGraphs.json" for folder in ("sceneGraphs", ".")]
    graphs_files = [file for file in graphs_files if file.is_file()][:1]
    questions, graphs = Spans(files), Spans(graphs_files)
    grouped = _Grouped(on_error, options.kinds)
    for number, file in enumerate(files):
        for span in json_entries(file, None, "question", on_error):
            if grouped.add(span.name, span.fields, span.where):
                questions.append(number, span)
    graph_N = np.full(len(grouped.image_of), -1, dtype=np.int32)
    for file in graphs_files:
        for span in json_entries(file, None, "scene graph", on_error):
            image = grouped.image_of.get(span.name)
            if image is None:
                continue
            if graph_N[image] >= 0:
                on_error(DataError(f"{span.where} stands there twice; drop one of them"))
                continue
            graph_N[image] = len(graphs)
            graphs.append(0, span)
    folder = ImageFolder(root / "images")
    good = []
    for image_id, n in counted(grouped.image_of.items(), f"looking at images of {split}", len(graph_N)):
        try:
            folder.image(f"{image_id}.jpg", f"a question of {files[0]}", options.check_images)
        except DataError as error:
            on_error(error)
            continue
        good.append(n)
    if not good:
        raise DataError(f"{files[0]}: no usable record; check data.path and data.split names")

    def build(n: int, numbers: np.ndarray) -> Record:
        asked = [gqa_question(fields, str(files[0]), options.kinds) for fields in questions.read(*numbers)]
        image = folder.image(f"{asked[0][0]}.jpg", str(files[0]), look=False)
        graph = graphs.read(int(graph_N[n]))[0] if graph_N[n] >= 0 else {}
        return Record(f"{split}/{asked[0][0]}", "gqa", (image,), tuple(q for _, q in asked), graph)

    return grouped.columns.records(build, len(graph_N)).take(np.array(good))


def _load_hub(root: Path, split: str, on_error: OnError, options: GqaOptions) -> Records:
    """The hub's layout: questions in one table, images in another."""
    name = f"{split}_{options.questions}"
    images = ParquetFiles(split_files(root / f"{name}_images", split, "parquet"), on_error)
    place_of: dict[str, int] = {}
    images.check_columns(["id", "image"])
    for row, fields in images.rows(["id"]):
        image_id = str(fields["id"])
        if image_id in place_of:
            on_error(DataError(f"{images.where(row)}: the image id {image_id!r} is used twice; drop one of them"))
        place_of.setdefault(image_id, row)
    table = ParquetFiles(split_files(root / f"{name}_instructions", split, "parquet"), on_error)
    table.check_columns(["id", "imageId", "question", "answer", "types"])
    grouped, rows = _Grouped(on_error, options.kinds), array("q")
    for row, fields in table.rows(["id", "imageId", "question", "answer", "types"]):
        where = table.where(row)
        if str(fields["imageId"]) not in place_of:
            on_error(DataError(f"{where}: no image {fields['imageId']!r} in {name}_images; copy that folder again"))
        elif grouped.add(str(fields["id"]), fields, where):
            rows.append(row)
    if not rows:
        raise DataError(f"{root / name}_instructions: no usable record; check data.path and data.split names")
    place_N = np.array([place_of[image_id] for image_id in grouped.image_of])

    def build(n: int, numbers: np.ndarray) -> Record:
        asked = [gqa_question(table.row(rows[i]), table.where(rows[i]), options.kinds) for i in numbers]
        image = images.images(int(place_N[n]), "image")
        return Record(f"{split}/{asked[0][0]}", "gqa", image, tuple(q for _, q in asked))

    return grouped.columns.records(build, len(place_N))


class _Grouped:
    """Questions by image, each id once."""

    def __init__(self, on_error: OnError, kinds: TypeName):
        self.columns, self.image_of = QuestionColumns(), dict[str, int]()
        self._on_error, self._kinds, self._seen = on_error, kinds, set[int]()

    def add(self, question_id: str, fields: Mapping[str, Any], where: str) -> bool:
        """Whether the question is sound."""
        try:
            image_id, question = gqa_question(fields, where, self._kinds)
        except DataError as error:
            self._on_error(error)
            return False
        if hash(question_id) in self._seen:
            self._on_error(DataError(f"{where}: the id {question_id!r} is used twice; drop one of them"))
            return False
        self._seen.add(hash(question_id))
        self.columns.append(self.image_of.setdefault(image_id, len(self.image_of)), question)
        return True


def gqa_question(fields: Mapping[str, Any], where: str, kinds: TypeName) -> tuple[str, KindQuestion]:
    """The image's id, and the question. Raises DataError."""
    types = fields.get("types")
    if not isinstance(types, Mapping) or not isinstance(types.get(kinds), str):
        raise DataError(f"{where}: no types.{kinds}; give the published file")
    image_id = text_of(fields.get("imageId"), "imageId", where)
    return image_id, question_of({**fields, "kind": types[kinds]}, where)


def _question_files(root: Path, split: str, which: str) -> list[Path]:
    for folder in (root / "questions1.2", root / "questions", root):
        file = folder / f"{split}_{which}_questions.json"
        if file.is_file():
            return [file]
        if parts := sorted((folder / f"{split}_{which}_questions").glob(f"{split}_{which}_questions_*.json")):
            return parts
    raise DataError(
        f"{root}: no {split}_{which}_questions.json, also not in questions1.2/, and no folder "
        f"{split}_{which}_instructions; data.path must name the folder of the published files"
    )
