"""Benchmarks whose questions have lettered options: from the rows of the published files to records.

Each docstring names the files, the fields and where they were checked; what no public source
showed is marked "not verified".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from trainer.evaluation.benchmarks.choices import letter_record, lettered, split_options
from trainer.evaluation.benchmarks.files import Row, image_file, image_of
from trainer.evaluation.benchmarks.records import LETTERS, AnswerKind, BenchmarkRecord

_IN_BRACKETS = r"\(@\)"
_WITH_POINT = r"(?<![^\s;；,])@[.．、]"
_WITH_COLON = r"(?<![^\s,;])@:"
_FREE_FORM: dict[str, AnswerKind] = {"integer": "integer", "float": "float", "list": "list"}


def blink(row: Row, _folder: Path) -> Iterator[BenchmarkRecord]:
    """BLINK (Fu et al. 2024): SUBTASK/val-*.parquet; the test split's answers are withheld.

    idx (val_SUBTASK_n), question, choices, answer "(B)", image_1 … image_4.
    Sources: zeyofu/BLINK_Benchmark, eval/evaluate.py; hub BLINK-Benchmark/BLINK.
    """
    idx = row.text("idx")
    named = re.fullmatch(r"val_(.+)_\d+", idx)
    if not named:
        raise row.error(f"idx {idx!r} is not val_SUBTASK_NUMBER", "give the files of the val split")
    images = [row.fields.get(f"image_{number}") for number in range(1, 5)]
    choices = row.texts("choices")
    question = lettered(row.text("question"), choices)
    yield letter_record(row, idx, tuple(i for i in images if i is not None), question, choices, category=named[1])


def mmvp(row: Row, folder: Path) -> Iterator[BenchmarkRecord]:
    """MMVP (Tong et al. 2024): Questions.csv and "MMVP Images"/n.jpg; questions 2k−1 and 2k are a pair.

    Index (the file says lndex), Question, Options "(a) Open (b) Closed", Correct Answer "(a)".
    Sources: tsb0601/MMVP, scripts/evaluate_mllm.py and gpt_grader.py; cambrian-mllm/cambrian, eval/eval/mmvp.
    """
    index = row.text("Index" if "Index" in row.fields else "lndex")
    if not index.isdecimal():
        raise row.error(f"index {index!r} is no number", "correct the record")
    _, choices = split_options(row, row.text("Options"), r"\((?i:@)\)")
    image = image_file(folder, f"MMVP Images/{index}.jpg", row.where)
    question = lettered(row.text("Question"), choices)
    group = str((int(index) + 1) // 2)
    yield letter_record(row, index, (image,), question, choices, answer=row.text("Correct Answer"), group=group)


def cv_bench(row: Row, folder: Path) -> Iterator[BenchmarkRecord]:
    """CV-Bench (Tong et al. 2024, Cambrian-1): test_2d.parquet and test_3d.parquet.

    idx, task, question, choices, answer "(C)", source (ADE20K, COCO, Omni3D).
    Source: README of the hub's nyu-visionx/CV-Bench.
    """
    choices = row.texts("choices")
    question = lettered(row.text("question"), choices)
    details = {"source": row.text("source")}
    image = (image_of(row, "image", folder),)
    yield letter_record(row, row.text("idx"), image, question, choices, category=row.text("task"), details=details)


def vstar(row: Row, folder: Path) -> Iterator[BenchmarkRecord]:
    """V* Bench (Wu & Xie 2024): test_questions.jsonl and the images it names.

    question_id, image "direct_attributes/sa_1.jpg", text (question, "(A) …" lines, an instruction), label "A",
    category.
    Sources: penghao-wu/vstar; cambrian-mllm/cambrian, eval/eval/vstar; EvolvingLMMs-Lab/lmms-eval, tasks/vstar_bench.
    The authors' script compares the mean log p per token of the options' texts (`likelihood_answer` with lengths).
    """
    text = re.sub(r"\s*\nAnswer with the option[^\n]*$", "", row.text("text"))
    stem, choices = split_options(row, text, _IN_BRACKETS)
    image = (image_of(row, "image", folder),)
    record_id, category = row.text("question_id"), row.text("category")
    yield letter_record(row, record_id, image, lettered(stem, choices), choices, row.text("label"), category=category)


def hr_bench(row: Row, folder: Path) -> Iterator[BenchmarkRecord]:
    """HR-Bench (Wang et al. 2025): hr_bench_4k.tsv or hr_bench_8k.tsv, or the hub's parquet; images in base64.

    index, question, A … D, answer "B", category (single, cross), cycle_category (which rotation of the options).
    Sources: DreamMr/HR-Bench, hrbench/vlmeval/dataset; EvolvingLMMs-Lab/lmms-eval, tasks/hrbench.
    """
    filled = takewhile(lambda letter: row.fields.get(letter) not in (None, ""), LETTERS)
    choices = tuple(row.text(letter) for letter in filled)
    question = lettered(row.text("question"), choices)
    image, cycle = (image_of(row, "image", folder),), row.text("cycle_category")
    record_id, category = row.text("index"), row.text("category")
    yield letter_record(row, record_id, image, question, choices, group=cycle, category=category)


def mmstar(row: Row, folder: Path) -> Iterator[BenchmarkRecord]:
    """MMStar (Chen et al. 2024): mmstar.parquet.

    index, question (ends in "Options: A: …, B: …"), image, answer "A", category, l2_category.
    Sources: MMStar-Benchmark/MMStar, eval/vlmeval/evaluate/mmstar.py; hub Lin-Chen/MMStar.
    """
    _, choices = split_options(row, row.text("question"), _WITH_COLON)
    details = {"category": row.text("category"), "l2_category": row.text("l2_category")}
    image, question = (image_of(row, "image", folder),), row.text("question")
    yield letter_record(row, row.text("index"), image, question, choices, category=details["category"], details=details)


def mme_realworld_lite(row: Row, folder: Path) -> Iterator[BenchmarkRecord]:
    """MME-RealWorld-Lite (Zhang et al. 2025): the hub's parquet (`bytes` in base64) or the tsv (`image` in base64).

    index, question, multi-choice options "(A) …", answer "C", category "Perception/Monitoring", l2-category.
    Sources: yfzhang114/MME-RealWorld, evaluation/; EvolvingLMMs-Lab/lmms-eval, tasks/mme_realworld. The names of the
    Lite files: not verified.
    """
    options = row.fields.get("multi-choice options")
    listed = "\n".join(row.texts("multi-choice options")) if isinstance(options, list) else str(options)
    _, choices = split_options(row, listed, _IN_BRACKETS)
    category = row.text("category")
    task = "Perception" if "perception" in category.lower() else "Reasoning"
    subtask = f"{task}/{category.split('/')[-1]}"
    kind = row.text("l2-category").lower()
    if "attribute" in kind:
        kind = f"{kind.split('/')[0]}/attribute"
    details = {"task": task, "subtask": subtask, "l2_category": f"{subtask}/{kind}"}
    image = image_of(row, "bytes" if "bytes" in row.fields else "image", folder)
    question = lettered(row.text("question"), choices)
    yield letter_record(row, row.text("index"), (image,), question, choices, category=subtask, details=details)


def math_vista(row: Row, folder: Path) -> Iterator[BenchmarkRecord]:
    """MathVista (Lu et al. 2024): testmini-*.parquet (`decoded_image`), or testmini.json and the images it names.

    pid, question, unit, choices, answer, question_type, answer_type, precision, metadata. The test split's answers are
    withheld. The answer of a multiple choice is the text of an option.
    Source: lupantech/MathVista, README and evaluation/calculate_score.py. There, a response that names no option takes
    the one of the smallest edit distance; here it is unparsed.
    """
    pid, kind, answer, text = row.text("pid"), row.text("answer_type"), row.text("answer"), row.text("question")
    if row.fields.get("unit"):
        text += f" (Unit: {row.text('unit')})"
    metadata = row.fields.get("metadata")
    if not isinstance(metadata, dict):
        raise row.error("no 'metadata'", "give the published file")
    keys = ("language", "source", "category", "task", "context", "grade")
    details = {
        **{key: metadata.get(key) for key in keys},
        "skills": tuple(metadata.get("skills") or ()),
        "question_type": row.text("question_type"),
        "answer_type": kind,
        "precision": row.fields.get("precision"),
    }
    image = (image_of(row, "decoded_image" if "decoded_image" in row.fields else "image", folder),)
    category = str(metadata.get("task"))
    if details["question_type"] == "multi_choice":
        choices = row.texts("choices")
        if answer not in choices:
            raise row.error(f"answer {answer!r} is none of the choices", "correct the record")
        letter = LETTERS[choices.index(answer)]
        yield letter_record(
            row, pid, image, lettered(text, choices), choices, letter, category=category, details=details
        )
    elif kind in _FREE_FORM:
        _check_number(row, answer)
        yield BenchmarkRecord(pid, image, text, (), answer, _FREE_FORM[kind], category=category, details=details)
    else:
        raise row.error(f"answer_type {kind!r} is none of integer, float, list", "correct the record")


def _check_number(row: Row, answer: str) -> None:
    """A number or a list of numbers; what cannot be compared is damage of the file, not of a prediction."""
    try:
        json.loads(answer)
    except ValueError as error:
        raise row.error(f"answer {answer!r} is neither a number nor a list", "correct the record") from error


def we_math(row: Row, folder: Path) -> Iterator[BenchmarkRecord]:
    """We-Math (Qiao et al. 2024): testmini.json and the images it names, or the hub's parquet (`image_path` embedded).

    ID (the problem), key (2steps_1, …, 3steps_multi), question, option "A. …;B. …", answer "C", knowledge concept.
    Source: We-Math/We-Math, data/testmini.json and evaluation/. A problem and its steps share the ID.
    """
    key = row.text("key")
    named = re.fullmatch(r"([23])steps_(\d|multi)", key)
    if not named:
        raise row.error(f"key {key!r} is not like 2steps_1 or 3steps_multi", "give the published file")
    _, choices = split_options(row, row.text("option"), _WITH_POINT)
    group = row.text("ID")
    details = {"n_steps": int(named[1]), "chained": named[2] == "multi"}
    question = lettered(row.text("question"), choices)
    image, category = (image_of(row, "image_path", folder),), row.text("knowledge concept")
    record_id = f"{group}/{key}"
    yield letter_record(row, record_id, image, question, choices, group=group, category=category, details=details)
