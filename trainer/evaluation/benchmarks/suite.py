"""The table of benchmarks, how one is loaded and how predictions are scored."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import DataError
from trainer.data.records import OnError, raise_error
from trainer.evaluation.benchmarks import metrics, multiple_choice, short_answers
from trainer.evaluation.benchmarks.extraction import extract, normalise
from trainer.evaluation.benchmarks.files import Row, published
from trainer.evaluation.benchmarks.metrics import Metric, Outcome
from trainer.evaluation.benchmarks.records import BenchmarkRecord
from trainer.evaluation.benchmarks.vsp import blocks_solved, maze_solved, vsp, vsp_rows

_SHOWN_CHARS = 200


@dataclass(frozen=True, slots=True)
class Benchmark:
    """How a benchmark's files become records, its metric, and the figure of the metric that stands for it."""

    rows: Callable[[Path], Iterator[Row]]
    convert: Callable[[Row, Path], Iterator[BenchmarkRecord]]
    metric: Metric
    headline: str = "accuracy"


BENCHMARKS: dict[str, Benchmark] = {
    "blink": Benchmark(
        published("*/val-*.parquet", images=("image_1", "image_2", "image_3", "image_4")),
        multiple_choice.blink,
        metrics.mean_over_categories,
    ),
    "mmvp": Benchmark(published("Questions.csv"), multiple_choice.mmvp, metrics.pair_accuracy, "pair_accuracy"),
    "cv_bench": Benchmark(published("test*.parquet"), multiple_choice.cv_bench, metrics.cv_bench),
    "vstar": Benchmark(published("test_questions.jsonl"), multiple_choice.vstar, metrics.accuracy),
    "hr_bench_4k": Benchmark(
        published("hr_bench_4k.tsv", "**/hr*bench_4k*.parquet"), multiple_choice.hr_bench, metrics.circular
    ),
    "hr_bench_8k": Benchmark(
        published("hr_bench_8k.tsv", "**/hr*bench_8k*.parquet"), multiple_choice.hr_bench, metrics.circular
    ),
    "mmstar": Benchmark(
        published("mmstar.parquet", "**/*.parquet"),
        multiple_choice.mmstar,
        metrics.by_details("category", "l2_category"),
    ),
    "mme_realworld_lite": Benchmark(
        published("*.tsv", "**/*.parquet", images=("image", "bytes")),
        multiple_choice.mme_realworld_lite,
        metrics.by_details("task", "subtask", "l2_category"),
    ),
    "math_vista": Benchmark(
        published("**/testmini*.parquet", "testmini.json", images=("decoded_image",)),
        multiple_choice.math_vista,
        metrics.by_details(
            "question_type", "answer_type", "language", "source", "category", "task", "context", "grade", "skills"
        ),
    ),
    "we_math": Benchmark(
        published("testmini.json", "**/testmini*.parquet", images=("image_path",)),
        multiple_choice.we_math,
        metrics.we_math,
        "score_strict",
    ),
    "pope": Benchmark(short_answers.pope_rows, short_answers.pope, metrics.pope, "f1"),
    "natural_bench": Benchmark(
        published("**/*.parquet", images=("Image_0", "Image_1")),
        short_answers.natural_bench,
        metrics.natural_bench,
        "group_accuracy",
    ),
    "vsp": Benchmark(vsp_rows, vsp, metrics.by_details("task", "task_level")),
    "gqa": Benchmark(
        published("**/testdev_balanced_questions.json"),
        short_answers.gqa,
        metrics.by_details("answer_type", "structural", "semantic"),
    ),
    "clevr": Benchmark(short_answers.clevr_rows, short_answers.clevr, metrics.accuracy),
    "tally_qa": Benchmark(published("test.json"), short_answers.tally_qa, metrics.counting),
}


def load_benchmark(name: str, folder: Path, on_error: OnError = raise_error) -> list[BenchmarkRecord]:
    """All records of a benchmark; images stay in their files.

    A damaged record goes to `on_error`, which raises or counts it; a damaged file always raises DataError.
    """
    benchmark = _benchmark(name)
    records: list[BenchmarkRecord] = []
    seen: set[str] = set()
    for row in benchmark.rows(folder):
        try:
            converted = list(benchmark.convert(row, folder))
            repeated = [record.record_id for record in converted if record.record_id in seen]
            if repeated:
                raise row.error(f"id {repeated[0]!r} stands twice", "keep one of the records")
        except DataError as error:
            on_error(error)
            continue
        seen.update(record.record_id for record in converted)
        records += converted
    if not records:
        raise DataError(f"{folder}: no usable record of {name}; give the folder that holds the published files")
    return records


def score(name: str, records: Sequence[BenchmarkRecord], predictions: Mapping[str, str]) -> dict[str, Any]:
    """A benchmark's official figures from one response per record, by record id.

    Returns plain values: benchmark, n, headline (name of the figure that stands for the benchmark), scores, chance
    (the same figures for guesses, over the `n` records with choices; None without any) and unparsed, which lists id and
    response of every record that no rule could read; those count as wrong. Raises DataError if a response is missing.
    """
    benchmark = _benchmark(name)
    if not records:
        raise DataError(f"{name}: no records to score; load the benchmark first")
    missing = [record.record_id for record in records if record.record_id not in predictions]
    if missing:
        raise DataError(
            f"{name}: {len(missing)} of {len(records)} records have no prediction, first {missing[0]!r}; answer all"
        )
    pairs, unparsed = [], []
    for record in records:
        response = predictions[record.record_id]
        answer = extract(record, response)
        pairs.append((record, Outcome(float(answer is not None and is_right(record, answer)), answer)))
        if answer is None:
            unparsed.append({"id": record.record_id, "response": response[:_SHOWN_CHARS]})
    guesses = [(record, Outcome(1 / len(record.choices), "guess")) for record in records if record.choices]
    return {
        "benchmark": name,
        "n": len(records),
        "headline": benchmark.headline,
        "scores": benchmark.metric(pairs),
        "chance": {"n": len(guesses), "scores": benchmark.metric(guesses)} if guesses else None,
        "unparsed": unparsed,
    }


def is_right(record: BenchmarkRecord, answer: str) -> bool:
    """Whether an extracted answer is the record's."""
    if record.answer_kind == "maze_plan":
        return maze_solved(record.details, answer)
    if record.answer_kind == "block_plan":
        return blocks_solved(record.details, answer)
    if record.answer_kind == "float":
        precision = record.details.get("precision")
        value = float(answer) if precision is None else round(float(answer), int(precision))
        return value == float(record.answer)
    if record.answer_kind == "list":
        return bool(json.loads(answer) == json.loads(record.answer))
    if record.answer_kind == "text":
        return answer == normalise(record.answer)
    return answer == record.answer


def _benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise DataError(f"no benchmark {name!r}; there are {', '.join(sorted(BENCHMARKS))}")
    return BENCHMARKS[name]
