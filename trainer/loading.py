"""A step's batch with its images made ready ahead of the step: by threads here, or by Ray Data on many machines.

What a step sees depends on seed and step alone, so both give the same batches, bit for bit, wherever a run goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

from anchor_service.cluster import ray_cluster
from shared.config import Config
from shared.errors import DataError
from shared.vlm import Prompt
from trainer.data import ErrorPolicy, other_parts, training_records
from trainer.data.curriculum import Curriculum
from trainer.data.records import OnError, Record
from trainer.data.sampling import Batch, Sampler
from trainer.image_features import ImagePreparer, OpenedImages, PreparedImages
from trainer.methods import METHODS
from trainer.microbatches import Microbatches

STEPS_AHEAD = 2
"""Steps whose images are loaded at once: one thread makes four images of a megapixel ready in about 130 ms."""

Seen = Callable[[Record], Record]
"""See `Method.seen`."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch with its images already read: through the image processor, or from the feature cache."""

    batch: Batch
    images: PreparedImages


class Loader(Protocol):
    """Gives the microbatches of one step after the other."""

    def parts(self, step: int) -> list[Prepared]:
        """The step's microbatches. Raises DataError naming image and record."""

    def close(self) -> None:
        """End what was started."""


def make_loader(config: Config, sampler: Sampler, images: ImagePreparer, microbatches: Microbatches) -> Loader:
    """The loader of `data.engine`."""
    if config.data.engine == "ray":
        from trainer.ray_loading import RayLoader  # imports Ray

        return RayLoader(config)
    seen = METHODS[config.method].seen
    return LocalLoader(sampler, images, seen, ErrorPolicy(config.data.on_error), microbatches, config.train.steps)


def ray_of_loader(config: Config) -> AbstractContextManager[None]:
    """Ray, if the loader needs it, with two CPUs beside what the anchors take."""
    if config.data.engine == "local":
        return contextlib.nullcontext()
    return ray_cluster(2 + sum(a.cpus * a.replicas for a in config.anchors if a.placement == "ray"))


def training_sampler(config: Config, prompt: Prompt) -> tuple[Sequence[Record], Sampler]:
    """The main source's training records, and what draws batches from all sources."""
    data, t = config.data, config.train
    records, others = training_records(data, t.seed, prompt), other_parts(data, t.seed, prompt)
    curriculum = Curriculum(data.curriculum)
    return records, Sampler(records, t.batch_images, data.questions_per_image, t.seed, curriculum, others)


def prepared_parts(batch: Batch, n_parts: int, images: ImagePreparer, seen: Seen, on_error: OnError) -> list[Prepared]:
    """A batch in equal parts, without the records whose images cannot be read: those go to `on_error`."""
    n = len(batch.records) // n_parts
    parts = []
    for start in range(0, len(batch.records), n):
        part = Batch(batch.records[start : start + n], batch.questions[start : start + n])
        kept, opened = _with_images(part, images, seen, on_error)
        parts.append(Prepared(kept, images.prepare(opened)))
    return parts


def _with_images(
    batch: Batch, images: ImagePreparer, seen: Seen, on_error: OnError
) -> tuple[Batch, list[OpenedImages]]:
    kept, opened = Batch([], []), []
    for record, asked in zip(batch.records, batch.questions, strict=True):
        try:
            opened.append(images.open(seen(record)))
        except DataError as error:
            on_error(error)
            continue
        kept.records.append(record)
        kept.questions.append(asked)
    if not opened:
        raise DataError(f"no image of {', '.join(r.record_id for r in batch.records)} can be read; check data.path")
    return kept, opened


class LocalLoader:
    """The next steps are loaded while this one runs, each in a thread."""

    def __init__(
        self,
        sampler: Sampler,
        images: ImagePreparer,
        seen: Seen,
        on_error: OnError,
        microbatches: Microbatches,
        n_steps: int,
    ):
        self._sampler, self._images, self._seen, self._on_error = sampler, images, seen, on_error
        self._microbatches, self._n_steps = microbatches, n_steps
        self._threads = ThreadPoolExecutor(max_workers=STEPS_AHEAD, thread_name_prefix="loader")
        self._drawing = Lock()
        self._ahead: dict[int, Future[list[Prepared]]] = {}

    def parts(self, step: int) -> list[Prepared]:
        """The step's microbatches. Raises DataError naming image and record."""
        parts = (self._ahead.pop(step, None) or self._submit(step)).result()
        if len(parts) != self._microbatches.count(step):
            # The step before ended the trial of `auto`, after this one's batch had been cut.
            parts = self._submit(step).result()
        for later in range(step + 1, min(step + 1 + STEPS_AHEAD, self._n_steps)):
            if later not in self._ahead:
                self._ahead[later] = self._submit(later)
        return parts

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _submit(self, step: int) -> Future[list[Prepared]]:
        return self._threads.submit(self._load, step, self._microbatches.count(step))

    def _load(self, step: int, n_parts: int) -> list[Prepared]:
        with self._drawing:  # a sampler is owned by one thread at a time
            batch = self._sampler.batch(step)
        return prepared_parts(batch, n_parts, self._images, self._seen, self._on_error)
