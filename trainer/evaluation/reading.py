"""Reading: what each anchor makes of a split's questions under some condition, and the four that bound the latents.

    ceiling   the anchor with the real image
    latents   the anchor with the latents of the image
    swapped   the anchor with the latents of another image of the split, the mean over several others
    floor     the anchor with the question alone

Exact match means that greedy decoding gives the reference answer and then ends its turn; it is read off the
same pass as the likelihood (see `ReadReply.matches`).

Legend: B images, K latents, D width, N questions of all images together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anchor_service.pool import AnchorPool, PendingReads
from shared.config import Config
from shared.errors import AnchorLostError
from shared.messages import ReadReply, ReadRequest
from shared.vlm import ImageTokens
from shared.vlm.generator import Generator
from trainer.data.records import Record
from trainer.evaluation.causal import swap_images
from trainer.evaluation.statistics import Figure, ImageBootstrap, recovered_share
from trainer.image_features import ImageFeatures
from trainer.norm_calibration import NormCalibration

Item = TypeVar("Item")
CONDITIONS = ("ceiling", "latents", "swapped", "floor")
N_SWAPS = 4
"""Other images whose latents each question is answered from: with one, chance alone moves the mean by a point."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one anchor made of N questions under one condition.

    hits_N: exact match, 0 or 1, or a mean over several readings. nll_N: −log p in nats per answer token.
    first_token_nll_N: of the first answer token alone. answers: see `ReadReply`; where asked for.
    """

    hits_N: np.ndarray
    nll_N: np.ndarray
    first_token_nll_N: np.ndarray
    answers: Sequence[str] = ()

    def select(self, chosen_N: np.ndarray) -> Outcome:
        """The figures of some of the questions."""
        return Outcome(self.hits_N[chosen_N], self.nll_N[chosen_N], self.first_token_nll_N[chosen_N])


Outcomes = dict[str, Outcome]
"""By anchor."""


class Reader:
    """Has every anchor of a pool read a split's questions, batch by batch.

    images_N: the image of each question. kinds_N: its kind.
    """

    def __init__(self, pool: AnchorPool, records: Sequence[Record], config: Config):
        self.records = records
        self.images_N = np.repeat(np.arange(len(records)), [len(record.questions) for record in records])
        self.kinds_N = np.array([question.kind for record in records for question in record.questions])
        self._pool = pool
        self._questions = [[question.message for question in record.questions] for record in records]
        self._batch_images = config.evaluation.batch_images
        self._count_end_of_turn = config.pool.count_end_of_turn

    def latents(self, latents_BKD: Tensor, with_answers: bool = False) -> Outcomes:
        """Latents in place of the image, as many as there are images; K may be smaller than in training."""
        return self._read(lambda here: latents_BKD[here].contiguous(), with_answers=with_answers)

    def nothing(self, image_markers: bool = True) -> Outcomes:
        """The question alone, with or without the tokens that stand around an image."""
        return self._read(lambda _: None, image_markers)

    def images(self) -> Outcomes:
        """The real images."""

        def submit(here: slice) -> PendingReads:
            images = [record.image_bytes() for record in self.records[here]]
            return self._pool.submit_images(images, self._questions[here], self._pool.names)

        return self._gather(submit)

    def _read(
        self,
        latents_of_batch: Callable[[slice], Tensor | None],
        image_markers: bool = True,
        with_answers: bool = False,
    ) -> Outcomes:
        def submit(here: slice) -> PendingReads:
            request = ReadRequest(
                self._pool.new_request_id(),
                self._questions[here],
                latents_of_batch(here),
                image_markers=image_markers,
                with_answers=with_answers,
            )
            return self._pool.submit(dict.fromkeys(self._pool.names, request))

        return self._gather(submit)

    def _gather(self, submit: Callable[[slice], PendingReads]) -> Outcomes:
        rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in self._pool.names}
        answers: dict[str, list[str]] = {name: [] for name in rows}
        # A batch is on its way before the replies to the one before are taken: no remote anchor waits for the trainer.
        for pending in _one_ahead(map(submit, _slices(len(self.records), self._batch_images))):
            replies = self._pool.gather(pending)
            for name in rows:
                if name not in replies:
                    raise AnchorLostError(f"evaluation needs every anchor: {self._pool.lost[name]}")
                rows[name] += _per_question(replies[name], self._count_end_of_turn)
                answers[name] += [answer for row in replies[name].answers for answer in row]
        columns = {name: np.array(values).T for name, values in rows.items()}
        return {name: Outcome(hits, nll, first, answers[name]) for name, (hits, nll, first) in columns.items()}


@torch.no_grad()
def latents_of(
    generator: Generator,
    features: ImageFeatures,
    records: Sequence[Record],
    batch_images: int,
    calibration: NormCalibration | None = None,
) -> Tensor:
    """(B, K, D) latents of all records, in evaluation mode."""
    batches = (features.of_records(chunk) for chunk in batched(records, batch_images))
    return _emitted(generator, batches, calibration)


@torch.no_grad()
def latents_of_images(
    generator: Generator,
    rows: Iterable[Sequence[Image.Image]],
    batch_images: int,
    calibration: NormCalibration | None = None,
) -> Tensor:
    """(B, K, D) latents of rows of images, in evaluation mode; no more than a batch of rows is held at a time."""

    def tokens(batch: list[Sequence[Image.Image]]) -> ImageTokens:
        inputs = generator.model.image_inputs([image for row in batch for image in row])
        return generator.image_tokens_from(inputs).in_rows([len(row) for row in batch])

    return _emitted(generator, (tokens(batch) for batch in batched(rows, batch_images)), calibration)


def _emitted(generator: Generator, batches: Iterable[ImageTokens], calibration: NormCalibration | None) -> Tensor:
    generator.train(False)
    latents = []
    for tokens in batches:
        latents_BKD = generator.emit(tokens)
        latents.append(latents_BKD if calibration is None else calibration(latents_BKD, tokens))
    return torch.cat(latents)


def batched(items: Iterable[Item], n: int) -> Iterator[list[Item]]:
    """Lists of n items, the last one perhaps shorter."""
    rest = iter(items)
    while batch := list(itertools.islice(rest, n)):
        yield batch


def mean_nll(
    generator: Generator, features: ImageFeatures, pool: AnchorPool, records: Sequence[Record], config: Config
) -> dict[str, float]:
    """Mean NLL over images per anchor, reading latents; the quick figure of validation."""
    reader = Reader(pool, records, config)
    outcomes = reader.latents(latents_of(generator, features, records, config.evaluation.batch_images))
    counts_B = np.bincount(reader.images_N)
    return {name: float(np.mean(np.bincount(reader.images_N, o.nll_N) / counts_B)) for name, o in outcomes.items()}


def read_bounds(reader: Reader) -> dict[str, Outcomes]:
    """Ceiling and floor: they do not depend on any latents."""
    return {"ceiling": reader.images(), "floor": reader.nothing()}


def read_swap(reader: Reader, latents_BKD: Tensor, seed: int) -> Outcomes:
    """For each image the latents of another of the split. Raises DataError for a single image."""
    # At random, not from the neighbour: data sets balance answers in order, so neighbours are not independent.
    return reader.latents(swap_images(latents_BKD, seed))


def mean_outcomes(readings: Sequence[Outcomes]) -> Outcomes:
    """Several readings of the same questions, averaged question by question."""

    def mean(outcomes: list[Outcome]) -> Outcome:
        return Outcome(
            np.mean([o.hits_N for o in outcomes], axis=0),
            np.mean([o.nll_N for o in outcomes], axis=0),
            np.mean([o.first_token_nll_N for o in outcomes], axis=0),
        )

    return {name: mean([reading[name] for reading in readings]) for name in readings[0]}


def of_anchor(by_condition: Mapping[str, Outcomes], name: str) -> dict[str, Outcome]:
    """One anchor's outcomes by condition."""
    return {condition: outcomes[name] for condition, outcomes in by_condition.items()}


def summarise(outcomes: Mapping[str, Outcome], reader: Reader, config: Config) -> dict[str, object]:
    """Figures of one anchor from its outcomes by condition: over the kinds trained on, per kind, and held-out."""
    bootstrap = ImageBootstrap(len(reader.records), config.evaluation.bootstrap_samples, config.train.seed)
    held_out_N = np.isin(reader.kinds_N, config.data.held_out_kinds)
    summary: dict[str, object] = _figures(outcomes, reader.images_N, ~held_out_N, bootstrap)
    summary["kinds"] = {
        str(kind): _figures(outcomes, reader.images_N, reader.kinds_N == kind, bootstrap)
        for kind in np.unique(reader.kinds_N)
    }
    if held_out_N.any():
        summary["held_out_kinds"] = _figures(outcomes, reader.images_N, held_out_N, bootstrap)
    return summary


def _figures(
    outcomes: Mapping[str, Outcome], images_N: np.ndarray, chosen_N: np.ndarray, bootstrap: ImageBootstrap
) -> dict[str, object]:
    def per_image(values_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return bootstrap.per_image(images_N[chosen_N], values_N[chosen_N])

    hits = {c: per_image(outcomes[c].hits_N) for c in CONDITIONS}
    figures: dict[str, object] = {c: bootstrap.mean(*hits[c]).to_json() for c in CONDITIONS}
    share: Figure = bootstrap.ratio(recovered_share, [hits["latents"], hits["floor"], hits["ceiling"]])
    figures["recovered_share"] = share.to_json()
    figures["nll"] = {c: bootstrap.mean(*per_image(outcomes[c].nll_N)).to_json() for c in CONDITIONS}
    figures["first_token_nll"] = {
        c: bootstrap.mean(*per_image(outcomes[c].first_token_nll_N)).to_json() for c in CONDITIONS
    }
    return figures


def _per_question(reply: ReadReply, count_end_of_turn: bool) -> list[tuple[float, float, float]]:
    """Hit, NLL, and NLL of the first token, for every question of a reply."""
    rows = []
    for logprobs, matches in zip(reply.logprobs, reply.matches, strict=True):
        for tokens, token_matches in zip(logprobs, matches, strict=True):
            counted = tokens if count_end_of_turn else tokens[:-1]
            rows.append((float(all(token_matches)), -sum(counted) / len(counted), -tokens[0]))
    return rows


def _one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each given when the next one has been made."""
    for held in itertools.islice(items, 1):
        for item in items:
            yield held
            held = item
        yield held


def _slices(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
