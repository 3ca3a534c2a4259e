"""One evaluation: a checkpoint, its anchors and a split, and what several suites need of them.

Legend: B images, K latents, D width, N questions of all images together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from anchor_service.pool import AnchorPool
from shared.config import Config
from shared.vlm import nearly_square, pooled_image_tokens
from shared.vlm.generator import Generator
from trainer.data.records import Record
from trainer.evaluation.causal import CausalTest, causal_tests
from trainer.evaluation.reading import (
    N_SWAPS,
    Outcomes,
    Reader,
    batched,
    latents_of,
    mean_outcomes,
    read_bounds,
    read_swap,
)
from trainer.evaluation.statistics import ImageBootstrap
from trainer.evaluation.usage import latents_of_questions
from trainer.image_features import ImageFeatures
from trainer.methods import METHODS, self_reader
from trainer.norm_calibration import NormCalibration, start_calibration

Track = Callable[[Iterable[str], str, int], Iterable[str]]
"""Iterates with a progress bar: names, of what, how many."""
_VISUAL_IMAGES = 64
"""Images whose visual tokens stand for all where a distribution is asked for."""


@dataclass
class Session:
    """One checkpoint, its anchors and a split. What several suites need is computed once, when first asked for."""

    config: Config
    generator: Generator
    features: ImageFeatures
    pool: AnchorPool
    records: Sequence[Record]
    track: Track
    _tests_read: dict[str, Outcomes] = field(default_factory=dict, init=False)

    @cached_property
    def reader(self) -> Reader:
        return Reader(self.pool, self.records, self.config)

    @cached_property
    def latents_BKD(self) -> Tensor:
        return self.latents_of(self.records)

    @cached_property
    def conditions(self) -> dict[str, Outcomes]:
        """All but `swapped`, which the reading suite alone asks for."""
        return read_bounds(self.reader) | {"latents": self.reader.latents(self.latents_BKD, with_answers=True)}

    @cached_property
    def first_swap(self) -> Outcomes:
        """A part of `swapped`, and the test `swap_images`."""
        return read_swap(self.reader, self.latents_BKD, self.config.train.seed)

    @cached_property
    def swapped(self) -> Outcomes:
        seeds = range(self.config.train.seed + 1, self.config.train.seed + N_SWAPS)
        return mean_outcomes([self.first_swap, *(read_swap(self.reader, self.latents_BKD, seed) for seed in seeds)])

    @cached_property
    def pooled_BKD(self) -> Tensor:
        """The images' own visual tokens, pooled to K."""
        return torch.cat([pooled for pooled, _ in self.visual_tokens(self.records)])

    @cached_property
    def visual_ND(self) -> Tensor:
        """Visual tokens of the first images, as they are."""
        return torch.cat([tokens for _, tokens in self.visual_tokens(self.records[:_VISUAL_IMAGES])])

    @cached_property
    def bootstrap(self) -> ImageBootstrap:
        return ImageBootstrap(len(self.records), self.config.evaluation.bootstrap_samples, self.config.train.seed)

    @cached_property
    def causal_tests(self) -> dict[str, CausalTest]:
        return causal_tests(self.generator.n_latents, self.visual_ND, self.pooled_BKD, self.config.train.seed)

    def read_tests(self, names: Sequence[str], what: str) -> dict[str, Outcomes]:
        """Outcomes of causal tests; each is read once, whichever suites ask for it."""
        missing = [name for name in names if name not in self._tests_read]
        for name in self.track(missing, what, len(missing)):
            self._tests_read[name] = self._read_test(name)
        return {name: self._tests_read[name] for name in names}

    def _read_test(self, name: str) -> Outcomes:
        # Two of them are what `reading` reads, too.
        if name == "swap_images":
            return self.first_swap
        if name == "markers_only":
            return self.conditions["floor"]
        test = self.causal_tests[name]
        swapped_BKD = test.swap(self.latents_BKD)
        if swapped_BKD.shape[1]:
            return self.reader.latents(swapped_BKD)
        return self.reader.nothing(image_markers=test.keeps_markers)

    def latents_of(self, records: Sequence[Record]) -> Tensor:
        """(B, K, D) latents as they are read: calibrated, if the config says so.

        Where they depend on the question, those of each record's first one.
        """
        batch_images = self.config.evaluation.batch_images
        if METHODS[self.config.method].latents_of == "question":
            reader = self_reader(self.config, self.generator)
            return latents_of_questions(reader, self.features, records, batch_images, self.calibration())
        return latents_of(self.generator, self.features, records, batch_images, self.calibration())

    def asking_once(self) -> Session:
        """A session with one question of each record, drawn at random, where latents belong to a question.

        One and not all: questions of one image are no independent samples.
        """
        if METHODS[self.config.method].latents_of != "question":
            return self
        rng = np.random.default_rng(self.config.train.seed)
        drawn = [record.questions[rng.integers(len(record.questions))] for record in self.records]
        return replace(self, records=[replace(r, questions=(q,)) for r, q in zip(self.records, drawn, strict=True)])

    def calibration(self) -> NormCalibration | None:
        """For one more pass over a data set."""
        return start_calibration(self.config.evaluation.norm_calibration)

    @property
    def trained_N(self) -> np.ndarray:
        """Which questions are of a kind that was trained on."""
        return ~np.isin(self.reader.kinds_N, self.config.data.held_out_kinds)

    @torch.no_grad()
    def visual_tokens(self, records: Sequence[Record]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batch by batch: visual tokens pooled to K (B, K, D), and as they are (N, D)."""
        for chunk in batched(records, self.config.evaluation.batch_images):
            tokens = self.features.of_records(chunk)
            yield pooled_image_tokens(tokens, nearly_square(self.generator.n_latents)), torch.cat(tokens.tokens)
