"""Data sources: each reads files into `Records`; `SOURCES` is the table."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import Progress

from shared.config import DataConfig, OtherSource, Section, parse_section
from shared.errors import ConfigError, DataError
from shared.messages import Question
from shared.vlm import Prompt
from trainer.data.clevr import load_clevr
from trainer.data.fields import FileOptions
from trainer.data.gqa import GqaOptions, load_gqa
from trainer.data.index import Records
from trainer.data.jsonl import load_jsonl
from trainer.data.records import OnError, Record
from trainer.data.sampling import Part, derangement, image_digests
from trainer.data.tables import DatasetOptions, TableOptions, load_dataset, load_parquet
from trainer.data.tallyqa import load_tallyqa
from trainer.data.webdataset import load_webdataset
from trainer.toy.dataset import ensure_toy_data
from trainer.toy.tasks import TASKS
from trainer.toy.tasks.dataset import EVALUATION_SIZES, ensure_tasks

log = logging.getLogger(__name__)

HELD_OUT_QUESTIONS = ":held_out_questions"
_SKIPPED_SHOWN = 3


class ErrorPolicy:
    """What happens to a damaged record: `data.on_error` fail raises, skip counts and shows the first few.

    Safe to call from the loader threads.
    """

    def __init__(self, on_error: Literal["fail", "skip"]):
        self.count = 0
        self._on_error = on_error
        self._counting = Lock()

    def __call__(self, error: DataError) -> None:
        """Raise the error or count it."""
        if self._on_error == "fail":
            raise error
        with self._counting:
            self.count += 1
            is_shown = self.count <= _SKIPPED_SHOWN
        if is_shown:
            log.warning("skipped: %s", error)


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


@dataclass(frozen=True, slots=True)
class Source:
    """A kind of data set. load: (data.path, split, what to do with damage, checked options) to records.

    options: what `data.options` may hold. prepare: makes what the source makes itself, if `data.path` is absent.
    """

    load: Callable[[Path, str, OnError, Any], Records]
    options: type[Section] = FileOptions
    prepare: Callable[[Path, Console], None] | None = None


SOURCES: dict[str, Source] = {
    "clevr": Source(load_clevr),
    "toy": Source(load_clevr, prepare=build_toy_data),
    "gqa": Source(load_gqa, GqaOptions),
    "tallyqa": Source(load_tallyqa),
    "jsonl": Source(load_jsonl),
    "parquet": Source(load_parquet, TableOptions),
    "datasets": Source(load_dataset, DatasetOptions),
    "webdataset": Source(load_webdataset, Section),
}


def prepare_data(config: DataConfig, console: Console) -> None:
    """Check source and options, and make what the source makes itself. Raises ConfigError, DataError."""
    for one in (config, *(other_config(config, other) for other in config.others)):
        source, _ = checked_source(one)
        if source.prepare is not None:
            source.prepare(one.path, console)


def checked_source(config: DataConfig) -> tuple[Source, Section]:
    """The source that the config names, and its options. Raises ConfigError."""
    source = SOURCES.get(config.source)
    if source is None:
        raise ConfigError(f"data.source: {config.source!r} is not known; use one of {', '.join(SOURCES)}")
    return source, parse_section(source.options, config.options, f"data.options of source {config.source}")


def load_records(config: DataConfig, split: str, prompt: Prompt | None = None) -> Records:
    """All records of a split, with damaged ones handled as `data.on_error` says. Raises DataError, ConfigError.

    split: `NAME:held_out_questions` is the one question of every image of NAME that data.hold_out_question keeps back.
    prompt: whose tokenizer every answer must have tokens in, if one is given.
    """
    source, options = checked_source(config)
    policy = ErrorPolicy(config.on_error)
    name = split.removesuffix(HELD_OUT_QUESTIONS)
    if name != split and not config.hold_out_question:
        raise ConfigError(f"data: split {split} was not kept from training; set data.hold_out_question: true")
    records = source.load(config.path, name, policy, options)
    if name != split:
        records = records.with_held_out_questions()
    if prompt is not None:
        records = with_tokens(records, prompt, policy)
    if policy.count:
        log.warning("%s/%s: %d damaged records skipped, %d kept", config.path, split, policy.count, len(records))
    return records


def training_records(config: DataConfig, seed: int, prompt: Prompt | None = None) -> Records:
    """The training split as the config wants it: what is held out removed, first n images, pairs kept or shuffled."""
    records = load_records(config, config.train_split, prompt)
    if config.hold_out_question:
        records = records.without_held_out_questions(image_digests(records))
    if config.drop_shared_images:
        records = without_images_of(records, _held_out_splits(config))
    records = records.without_kinds(config.held_out_kinds)[: config.max_images]
    if not records:
        raise DataError(f"{config.path}: what `data` holds out leaves no training question; hold out fewer kinds")
    if config.pairing == "shuffled":
        records = records.with_questions_of(derangement(len(records), seed, image_digests(records)))
    return records.kept()


def other_config(config: DataConfig, other: OtherSource) -> DataConfig:
    """The config of a further source of a mixture: what it does not set is as in the main one."""
    own = {**other.model_dump(exclude={"weight"}), "others": (), "drop_shared_images": False}
    return config.model_copy(update=own)


def other_parts(config: DataConfig, seed: int, prompt: Prompt | None = None) -> list[Part]:
    """The training records of a mixture's further sources; what the main source holds out stays out of them, too."""
    parts = []
    for other in config.others:
        records = training_records(other_config(config, other), seed, prompt)
        if config.drop_shared_images:
            records = without_images_of(records, _held_out_splits(config))
        parts.append(Part(records, other.weight))
    return parts


def _held_out_splits(config: DataConfig) -> list[Records]:
    """Validation and test split, if they are not of the training images."""
    names = {config.val_split, config.test_split} - {config.train_split, config.train_split + HELD_OUT_QUESTIONS}
    return [load_records(config, name) for name in sorted(names)]


def without_images_of(records: Records, others: Sequence[Sequence[Record]]) -> Records:
    """Records none of whose images, byte for byte, is one of the others'."""
    taken = {digest for other in others for digests in image_digests(other) for digest in digests}
    kept = [taken.isdisjoint(digests) for digests in image_digests(records)]
    if not all(kept):
        log.warning("%d training records dropped: their images are also held out", len(kept) - sum(kept))
    return records.take(np.flatnonzero(kept))


def readable_records(records: Sequence[Record], n: int, on_error: OnError) -> list[Record]:
    """The first n records whose images can be decoded; the others go to `on_error`."""
    kept: list[Record] = []
    for record in records:
        if len(kept) == n:
            break
        try:
            record.load_images()
        except DataError as error:
            on_error(error)
            continue
        kept.append(record)
    return kept


def with_tokens(records: Records, prompt: Prompt, on_error: OnError) -> Records:
    """Records without the questions whose answer has no tokens; each distinct answer is tokenized once."""
    silent: dict[str, DataError] = {}
    for answer in sorted(records.answers()):
        try:
            prompt.branches([[Question("?", answer)]])
        except DataError as error:
            silent[answer] = error
    if not silent:
        return records
    for record in records.with_answers(silent):
        for question in record.questions:
            on_error(DataError(f"{record.where}: record {record.record_id}: {silent[question.answer]}"))
    return records.without_answers(silent)
