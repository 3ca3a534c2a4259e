"""The labelling job on Ray Data: a pool of actors, each with an engine; whatever is done is on disk soon after.

Actors take records, a batch at a time, and give label lines back in any order; this process writes them.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from anchor_service.cluster import ray_cluster
from shared.config import DataConfig, Dtype
from shared.errors import DataError, ModelError, VisualLatentsError
from shared.vlm import load_prompt
from trainer.data import ErrorPolicy, load_records, prepare_data
from trainer.data.records import Record
from trainer.difficulty.engine import Engine, SamplingConfig, transformers_engine
from trainer.difficulty.labels import LabelFolder, data_digest, model_digest
from trainer.difficulty.vllm_engine import check_family, vllm_engine
from trainer.progress import track


@dataclass(frozen=True, slots=True)
class Workers:
    """The pool. batch_records: given to an actor at a time, and lost with it if it dies.

    vllm: the interpreter of an environment with vLLM and this project, which then samples; None: transformers.
    """

    actors: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    batch_records: int = 8
    vllm: str | None = None


def label_split(
    model: str,
    dtype: Dtype,
    data: DataConfig,
    split: str,
    sampling: SamplingConfig,
    workers: Workers,
    folder: Path,
    console: Console,
    save_every_s: float = 30.0,
) -> list[dict[str, Any]]:
    """What `difficulty` does: label a split into `folder`; returns all lines.

    Raises ConfigError if the folder holds labels of another model, other data, another engine or other sampling;
    ModelError if the model cannot be loaded.
    """
    prepare_data(data, console)
    if workers.vllm is not None:
        check_family(model)
    records = load_records(data, split, load_prompt(model))
    settings = {
        "model_sha256": model_digest(model),
        "data_sha256": data_digest(track(records, console, "reading images")),
        "dtype": dtype,
        "engine": "transformers" if workers.vllm is None else "vllm",
        # Rows share nothing, so how many are sampled at a time is no part of what was done.
        **sampling.model_dump(exclude={"rows"}),
    }
    labels = LabelFolder(folder, settings, {"model": model, "data": str(data.path), "split": split})
    if workers.vllm is None:
        device = "cuda" if workers.gpus > 0 else "cpu"
        make_engine = functools.partial(transformers_engine, model, dtype, device, sampling)
    else:
        make_engine = functools.partial(vllm_engine, model, dtype, workers.gpus, sampling)
    label_questions(records, labels, make_engine, workers, ErrorPolicy(data.on_error), console, save_every_s)
    return labels.rows()


def label_questions(
    records: Sequence[Record],
    labels: LabelFolder,
    make_engine: Callable[[], Engine],
    workers: Workers,
    on_error: ErrorPolicy,
    console: Console,
    save_every_s: float = 30.0,
) -> None:
    """Label what `labels` lacks. Starts a local Ray unless one is there. Raises DataError as `on_error` says.

    make_engine: called once in every actor.
    """
    done = {row["record"] for row in labels.rows()}
    left = [record for record in records if record.record_id not in done]
    if done:
        console.print(f"going on: {len(done)} of {len(records)} records are labelled", highlight=False)
    if left:
        with ray_cluster(workers.actors * workers.cpus):
            _label(left, len(records), labels, make_engine, workers, on_error, console, save_every_s)
    labels.finish()


def _label(
    left: Sequence[Record],
    n_records: int,
    labels: LabelFolder,
    make_engine: Callable[[], Engine],
    workers: Workers,
    on_error: ErrorPolicy,
    console: Console,
    save_every_s: float,
) -> None:
    n_questions, n_samples, started, saved_at = 0, 0, time.monotonic(), time.monotonic()
    unsaved: list[dict[str, Any]] = []
    speed = ""
    try:
        with _bar(console) as bar:
            task = bar.add_task("records", total=n_records, completed=n_records - len(left), speed=speed)
            for lines in _answered(left, make_engine, workers):
                good = [line for line in lines if "error" not in line]
                unsaved += good
                for line in lines:
                    if "error" in line:
                        on_error(DataError(line["error"]))
                n_questions += len(good)
                n_samples += sum(line["samples"] for line in good)
                seconds = time.monotonic() - started
                speed = f"{n_questions / seconds:.1f} questions/s, {n_samples / seconds:.1f} samples/s"
                bar.update(task, advance=len({line["record"] for line in lines}), speed=speed)
                if unsaved and time.monotonic() - saved_at >= save_every_s:
                    labels.write_part(unsaved)
                    unsaved, saved_at = [], time.monotonic()
                    if not console.is_terminal:
                        console.print(f"{n_questions} questions labelled, {speed}", highlight=False)
    finally:
        if unsaved:
            labels.write_part(unsaved)
    console.print(f"{n_questions} questions labelled: {speed}", highlight=False)


def _answered(
    left: Sequence[Record], make_engine: Callable[[], Engine], workers: Workers
) -> Iterator[list[dict[str, Any]]]:
    """Label lines, batch by batch, in the order in which batches are done. Raises ModelError without an engine."""
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Scenes are of no use to an engine and many times larger than the rest.
    items = [{"record": replace(record, scene={})} for record in left]
    # One block per batch: a block's results come back as a whole, so larger ones would be saved later.
    n_blocks = -(-len(left) // workers.batch_records)
    answered = ray.data.from_items(items, override_num_blocks=n_blocks).map_batches(
        _Worker,
        batch_size=workers.batch_records,
        compute=ray.data.ActorPoolStrategy(size=workers.actors),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus,
        fn_constructor_args=(make_engine,),
        runtime_env={} if workers.vllm is None else {"py_executable": workers.vllm},
    )
    for batch in answered.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        for text in batch["lines"]:
            lines = json.loads(text)
            if isinstance(lines, str):
                raise ModelError(lines)
            yield lines


class _Worker:
    """One actor with its engine, or with the reason why there is none: Ray would try again and bury it."""

    def __init__(self, make_engine: Callable[[], Engine]):
        self._engine: Engine | None = None
        self._reason = ""
        try:
            self._engine = make_engine()
        except VisualLatentsError as error:
            self._reason = str(error)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        lines = self._reason if self._engine is None else self._engine(list(batch["record"]))
        return {"lines": [json.dumps(lines, ensure_ascii=False)]}


def print_labels(rows: Sequence[dict[str, Any]], threshold: int, console: Console) -> None:
    """How many questions have how many right answers, and which of them would get latents."""
    counts = Counter(int(row["right"]) for row in rows)
    table = Table("right answers", "questions", "share", "latents", title="Difficulty")
    for column in table.columns[:3]:
        column.justify = "right"
    for right in range(max([threshold, *counts]) + 1):
        n = counts[right]
        share = n / max(1, len(rows))
        table.add_row(f"{right}", f"{n}", f"{share:.1%}", "yes" if right <= threshold else "no")
    console.print(table)
    hard = sum(n for right, n in counts.items() if right <= threshold)
    console.print(
        f"{hard} of {len(rows)} questions ({hard / max(1, len(rows)):.1%}) have at most {threshold} right answers",
        highlight=False,
    )


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
