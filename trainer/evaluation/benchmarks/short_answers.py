"""Benchmarks answered by yes or no, a count or a short text: from the rows of the published files to records.

Each docstring names the files, the fields and where they were checked; what no public source showed is marked
"not verified".
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.data.clevr import load_clevr
from trainer.data.gqa import gqa_question
from trainer.data.records import ImageFile
from trainer.data.tallyqa import count_question
from trainer.evaluation.benchmarks.choices import letter_record, yes_no_record
from trainer.evaluation.benchmarks.files import Row, find_files, image_file, image_of, read_jsonl
from trainer.evaluation.benchmarks.records import AnswerKind, BenchmarkRecord

_CLEVR_ANSWERS = (
    ("yes", "no"),
    tuple(str(number) for number in range(11)),
    ("large", "small"),
    ("rubber", "metal"),
    ("cube", "sphere", "cylinder"),
    ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow"),
)
"""The 28 answers of CLEVR by what is asked for (Johnson et al. 2017, figure 2)."""


def pope_rows(folder: Path) -> Iterator[Row]:
    """Rows of the three files, which hold one JSON object per line whatever their ending; see `pope`."""
    for file in find_files(folder, "coco_pope_*.json", "**/coco_pope_*.json"):
        for row in read_jsonl(file):
            yield Row({**row.fields, "subset": file.stem.rpartition("_")[2]}, row.where)


def pope(row: Row, folder: Path) -> Iterator[BenchmarkRecord]:
    """POPE (Li et al. 2023): coco_pope_{random,popular,adversarial}.json and val2014/COCO_val2014_….jpg.

    question_id, image, text "Is there a … in the image?", label "yes".
    Source: AoiDragon/POPE, README and evaluate.py.
    """
    subset = row.text("subset")
    image = image_file(folder, f"val2014/{row.text('image')}", row.where)
    yield yes_no_record(
        row, f"{subset}/{row.text('question_id')}", image, row.text("text"), row.text("label"), category=subset
    )


def natural_bench(row: Row, folder: Path) -> Iterator[BenchmarkRecord]:
    """NaturalBench (Li et al. 2024): *.parquet; two questions on two images, four records a row.

    Index, Question_q, Image_i, Image_i_Question_q ("Yes", "No", "A" or "B"), Question_Type (yes_no, multiple_choice).
    Source: Baiqi-Li/NaturalBench, naturalbench_vqa.py. How a multiple-choice question lists its two options: not
    verified, so they are taken as part of the question.
    """
    index, question_type = row.text("Index"), row.text("Question_Type")
    for question in (0, 1):
        for number in (0, 1):
            record_id, text = f"{index}/q{question}_i{number}", row.text(f"Question_{question}")
            image, answer = image_of(row, f"Image_{number}", folder), row.text(f"Image_{number}_Question_{question}")
            if question_type == "yes_no":
                yield yes_no_record(row, record_id, image, text, answer, group=index, category=question_type)
            else:
                yield letter_record(
                    row, record_id, (image,), text, ("", ""), answer, group=index, category=question_type
                )


def gqa(row: Row, folder: Path) -> Iterator[BenchmarkRecord]:
    """GQA (Hudson & Manning 2019): testdev_balanced_questions.json and images/ID.jpg.

    The test split's answers are withheld. Keyed by question: imageId, question, answer, types {structural, semantic}.
    Source: the authors' eval.py (gqadataset.org): exact match; open questions are those of structural type `query`. Its
    consistency, validity, plausibility and distribution need files or answers that testdev lacks, and are left out.
    """
    image_id, asked = gqa_question(row.fields, row.where, "structural")
    details = {
        "answer_type": "open" if asked.kind == "query" else "binary",
        "structural": asked.kind,
        "semantic": str(row.fields["types"].get("semantic")),
    }
    images = (image_file(folder, f"images/{image_id}.jpg", row.where),)
    yield BenchmarkRecord(
        row.text("id"), images, asked.text, (), asked.answer, "text", category=asked.kind, details=details
    )


def clevr_rows(folder: Path) -> Iterator[Row]:
    """One row per question of the val split; see `clevr`."""
    for record in load_clevr(folder, "val"):
        (image,) = record.images
        for number, question in enumerate(record.questions):
            fields = {"id": f"{record.record_id}/{number}", "question": question.text, "answer": question.answer}
            yield Row({**fields, "image": Path(str(image)), "kind": question.kind}, f"{image}: {number}")


def clevr(row: Row, _folder: Path) -> Iterator[BenchmarkRecord]:
    """CLEVR v1.0 (Johnson et al. 2017): the val split, since the published test split has no answers.

    Read by `trainer.data.clevr`. Choices are the answers of the same sort (colours, counts, …); exact match.
    """
    answer = row.text("answer")
    choices = next((answers for answers in _CLEVR_ANSWERS if answer in answers), ())
    kind: AnswerKind = "yes_no" if answer in ("yes", "no") else "integer" if answer.isdecimal() else "text"
    image, question = ImageFile(row.fields["image"]), row.text("question")
    yield BenchmarkRecord(row.text("id"), (image,), question, choices, answer, kind, category=row.text("kind"))


def tally_qa(row: Row, folder: Path) -> Iterator[BenchmarkRecord]:
    """TallyQA (Acharya et al. 2019): test.json and the images it names (VG_100K/…, VG_100K_2/…, COCO's folders).

    question_id, image, question, answer 4, issimple.
    Source: manoja328/TallyQA_dataset, README.
    """
    image, asked = count_question(row.fields, row.where)
    images = (image_file(folder, image, row.where),)
    yield BenchmarkRecord(row.text("question_id"), images, asked.text, (), asked.answer, "integer", category=asked.kind)
