"""Reading: how well each anchor answers from the latents, and from what bounds them.

    ceiling   the anchor with the real image
    latents   the anchor with the latents of the image
    swapped   the anchor with the latents of another image of the split
    floor     the anchor with the question alone

Exact match means that greedy decoding gives the reference answer and then ends its turn; it is read off the
same pass as the likelihood (see `ReadReply.matches`).

Legend: B images, K latents, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from anchor_service.pool import AnchorPool
from shared.config import Config
from shared.messages import Question, ReadReply, ReadRequest
from shared.reading import nll_per_image
from trainer.data.records import Record
from trainer.data.sampling import derangement
from trainer.evaluation.statistics import Figure, ImageBootstrap, recovered_share
from trainer.generator import Generator
from trainer.image_features import ImageFeatures

CONDITIONS = ("ceiling", "latents", "swapped", "floor")
Progress = Callable[[int, int], None]


@dataclass(slots=True)
class AnswerTable:
    """One row per question: what an anchor made of it under each condition."""

    images: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    hits: dict[str, list[bool]] = field(default_factory=lambda: {c: [] for c in CONDITIONS})
    nll: dict[str, list[float]] = field(default_factory=lambda: {c: [] for c in CONDITIONS})
    first_token_nll: dict[str, list[float]] = field(default_factory=lambda: {c: [] for c in CONDITIONS})

    def add(self, condition: str, reply: ReadReply, count_end_of_turn: bool) -> None:
        """Append a reply's questions to one condition."""
        for logprobs, matches in zip(reply.logprobs, reply.matches, strict=True):
            for tokens, token_matches in zip(logprobs, matches, strict=True):
                counted = tokens if count_end_of_turn else tokens[:-1]
                self.hits[condition].append(all(token_matches))
                self.nll[condition].append(-sum(counted) / len(counted))
                self.first_token_nll[condition].append(-tokens[0])


@torch.no_grad()
def latents_of(generator: Generator, features: ImageFeatures, records: Sequence[Record], batch_images: int) -> Tensor:
    """(B, K, D) latents of all records, in evaluation mode."""
    generator.train(False)
    latents = []
    for chunk in _chunks(records, batch_images):
        images = features.prepare([features.open(record) for record in chunk])
        latents.append(generator.emit(features.tokens(images)))
    return torch.cat(latents)


def mean_nll(
    generator: Generator, features: ImageFeatures, pool: AnchorPool, records: Sequence[Record], config: Config
) -> dict[str, float]:
    """Mean NLL over images per anchor, reading latents; the quick figure of validation."""
    latents_BKD = latents_of(generator, features, records, config.evaluation.batch_images)
    sums = dict.fromkeys(pool.names, 0.0)
    first = 0
    for chunk in _chunks(records, config.evaluation.batch_images):
        replies = _read(pool, latents_BKD[first : first + len(chunk)], _questions(chunk))
        first += len(chunk)
        for name, reply in replies.items():
            sums[name] += sum(nll_per_image(reply.logprobs, config.pool.count_end_of_turn))
    return {name: total / len(records) for name, total in sums.items() if name in pool.names}


def read_all(
    generator: Generator,
    features: ImageFeatures,
    pool: AnchorPool,
    records: Sequence[Record],
    config: Config,
    progress: Progress,
) -> dict[str, AnswerTable]:
    """Every question of every record under every condition, by anchor. `progress` gets (images done, all)."""
    latents_BKD = latents_of(generator, features, records, config.evaluation.batch_images)
    # At random, not from the neighbour: data sets balance answers in order, so neighbours are not independent.
    swapped_BKD = latents_BKD[torch.from_numpy(derangement(len(records), config.train.seed))]
    tables = {name: AnswerTable() for name in pool.names}
    first = 0
    for chunk in _chunks(records, config.evaluation.batch_images):
        here = slice(first, first + len(chunk))
        questions = _questions(chunk)
        replies = {
            "ceiling": pool.read_images([r.image_path.read_bytes() for r in chunk], questions, pool.names),
            "latents": _read(pool, latents_BKD[here], questions),
            "swapped": _read(pool, swapped_BKD[here], questions),
            "floor": _read(pool, None, questions),
        }
        for name, table in tables.items():
            for condition, by_anchor in replies.items():
                table.add(condition, by_anchor[name], config.pool.count_end_of_turn)
            for i, record in enumerate(chunk):
                table.images += [first + i] * len(record.questions)
                table.kinds += [question.kind for question in record.questions]
        first += len(chunk)
        progress(first, len(records))
    return tables


def summarise(table: AnswerTable, n_images: int, config: Config) -> dict[str, object]:
    """Figures of one anchor: over the kinds trained on, per kind, and over the held-out kinds."""
    bootstrap = ImageBootstrap(n_images, config.evaluation.bootstrap_samples, config.train.seed)
    kinds, images = np.array(table.kinds), np.array(table.images)
    held_out = np.isin(kinds, config.data.held_out_kinds)
    summary: dict[str, object] = _figures(table, images, ~held_out, n_images, bootstrap)
    summary["kinds"] = {
        kind: _figures(table, images, kinds == kind, n_images, bootstrap) for kind in sorted(set(table.kinds))
    }
    if held_out.any():
        summary["held_out_kinds"] = _figures(table, images, held_out, n_images, bootstrap)
    return summary


def _figures(
    table: AnswerTable, images: np.ndarray, chosen: np.ndarray, n_images: int, bootstrap: ImageBootstrap
) -> dict[str, object]:
    counts = np.bincount(images[chosen], minlength=n_images).astype(float)

    def sums(values: Sequence[float]) -> np.ndarray:
        return np.bincount(images[chosen], weights=np.array(values, dtype=float)[chosen], minlength=n_images)

    hits = {c: (sums(table.hits[c]), counts) for c in CONDITIONS}
    figures: dict[str, object] = {c: bootstrap.mean(*hits[c]).to_json() for c in CONDITIONS}
    share: Figure = bootstrap.ratio(recovered_share, [hits["latents"], hits["floor"], hits["ceiling"]])
    figures["recovered_share"] = share.to_json()
    figures["nll"] = {c: bootstrap.mean(sums(table.nll[c]), counts).to_json() for c in CONDITIONS}
    figures["first_token_nll"] = {
        c: bootstrap.mean(sums(table.first_token_nll[c]), counts).to_json() for c in CONDITIONS
    }
    return figures


def _read(pool: AnchorPool, latents: Tensor | None, questions: Sequence[Sequence[Question]]) -> dict[str, ReadReply]:
    plain = None if latents is None else latents.contiguous()
    request = ReadRequest(pool.new_request_id(), questions, plain)
    return pool.read(dict.fromkeys(pool.names, request))


def _questions(records: Sequence[Record]) -> list[list[Question]]:
    return [[question.message for question in record.questions] for record in records]


def _chunks(records: Sequence[Record], n: int) -> Iterator[Sequence[Record]]:
    for start in range(0, len(records), n):
        yield records[start : start + n]
