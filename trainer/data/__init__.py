"""Data sources: each reads files into `Record`s; `load_records` picks the one that the config names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import Progress

from shared.config import DataConfig
from shared.errors import DataError
from shared.messages import Question
from shared.vlm import Prompt
from trainer.data.clevr import OnError, load_clevr
from trainer.data.jsonl import load_jsonl
from trainer.data.records import Record
from trainer.data.sampling import shuffled_pairs, without_kinds
from trainer.toy.dataset import ensure_toy_data
from trainer.toy.tasks import TASKS
from trainer.toy.tasks.dataset import EVALUATION_SIZES, ensure_tasks

log = logging.getLogger(__name__)

_SKIPPED_SHOWN = 3


class ErrorPolicy:
    """What happens to a damaged record: `data.on_error` fail raises, skip counts and shows the first few.

    Safe to call from the loader thread.
    """

    def __init__(self, on_error: Literal["fail", "skip"]):
        self.count = 0
        self._on_error = on_error

    def __call__(self, error: DataError) -> None:
        """Raise the error or count it."""
        if self._on_error == "fail":
            raise error
        self.count += 1
        if self.count <= _SKIPPED_SHOWN:
            log.warning("skipped: %s", error)


def prepare_data(config: DataConfig, console: Console) -> None:
    """Make what the config's source makes itself: the toy data set, if its folder is absent."""
    if config.source == "toy":
        build_toy_data(config.path, console)


def build_toy_data(path: Path, console: Console) -> None:
    """Write the toy data set unless it is there, with a progress bar."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("toy data", total=None)
        ensure_toy_data(path, progress=lambda done, total: bar.update(task, completed=done, total=total))


def build_toy_tasks(path: Path, tasks: Sequence[str], train: int, seed: int, console: Console) -> None:
    """Write toy tasks (all, if none is named) unless they are there, with a progress bar."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("toy tasks", total=None)
        sizes = {"train": train, **EVALUATION_SIZES}
        ensure_tasks(path, tasks or list(TASKS), sizes, seed, lambda done, n: bar.update(task, completed=done, total=n))


def load_records(config: DataConfig, split: str, prompt: Prompt | None = None) -> list[Record]:
    """All records of a split, with damaged ones handled as `data.on_error` says. Raises DataError.

    prompt: whose tokenizer every answer must have tokens in, if one is given.
    """
    policy = ErrorPolicy(config.on_error)
    load = load_jsonl if config.source == "jsonl" else load_clevr
    records: Sequence[Record] = load(config.path, split, policy)
    if prompt is not None:
        records = with_tokens(records, prompt, policy)
    if policy.count:
        log.warning("%s/%s: %d damaged records skipped, %d kept", config.path, split, policy.count, len(records))
    return list(records)


def training_records(config: DataConfig, seed: int, prompt: Prompt | None = None) -> list[Record]:
    """The training split as the config wants it: first n images, held-out kinds removed, pairs kept or shuffled."""
    loaded = load_records(config, config.train_split, prompt)
    records = without_kinds(loaded, config.held_out_kinds)[: config.max_images]
    if not records:
        raise DataError(f"{config.path}: data.held_out_kinds leaves no training question; hold out fewer kinds")
    return shuffled_pairs(records, seed) if config.pairing == "shuffled" else records


def with_tokens(records: Sequence[Record], prompt: Prompt, on_error: OnError) -> list[Record]:
    """Records without the questions whose answer has no tokens; each distinct answer is tokenized once."""
    silent: dict[str, DataError] = {}
    for answer in sorted({question.answer for record in records for question in record.questions}):
        try:
            prompt.branches([[Question("?", answer)]])
        except DataError as error:
            silent[answer] = error
    if not silent:
        return list(records)
    kept = []
    for record in records:
        for question in record.questions:
            if question.answer in silent:
                on_error(DataError(f"{record.where}: record {record.record_id}: {silent[question.answer]}"))
        questions = tuple(q for q in record.questions if q.answer not in silent)
        if questions:
            kept.append(replace(record, questions=questions))
    return kept
