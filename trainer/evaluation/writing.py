"""Responses that a model with latents of its own writes (method gap), and whether their answers are right.

    normal           greedy words; latents where the model opens a span
    calibrated       every latent rescaled to the norm of visual embeddings (`trainer.norm_calibration`)
    latents_removed  no span is ever opened
    other_images     each span holds the latents of the response to another record

Exact match: the response ends its turn, is of the form, and its answer is the reference answer.

Legend: B records, N questions of all records together, K latents, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from shared.config import Config, NormCalibrationConfig
from shared.errors import CheckpointError
from shared.vlm import GrowingRows
from shared.vlm.generator import Generator
from trainer.checkpoint import CheckpointStore, load_trainer_state
from trainer.data.records import Record
from trainer.evaluation.reading import Outcome, batched
from trainer.gap.generation import Written, generate, greedy
from trainer.gap.heads import head_of_state
from trainer.image_features import ImageFeatures
from trainer.methods.gap import GapOptions, ResponseLayout
from trainer.norm_calibration import NormCalibration

WRITING_CONDITIONS = ("normal", "calibrated", "latents_removed", "other_images")


def response_reading(
    config: Config, generator: Generator, features: ImageFeatures, records: Sequence[Record]
) -> ResponseReading:
    """What the generator of a run of method gap writes. Raises CheckpointError."""
    options = GapOptions.model_validate(config.options)
    return ResponseReading(
        generator,
        ResponseLayout(generator, options),
        load_head(config, options, generator),
        features,
        records,
        config.evaluation.batch_images,
        config.evaluation.norm_calibration or NormCalibrationConfig(),
    )


def load_head(config: Config, options: GapOptions, generator: Generator) -> nn.Module:
    """The latent head of a run's best checkpoint. Raises CheckpointError."""
    checkpoint = CheckpointStore(config.run.dir, config.train.keep_checkpoints).best()
    if checkpoint is None:
        raise CheckpointError(f"{config.run.dir}: no checkpoint to evaluate; train first")
    state = load_trainer_state(checkpoint)["extra_modules"]
    return head_of_state(options.head, generator.model.width, state).to(generator.model.device)


@dataclass(slots=True)
class ResponseReading:
    """A generator's own responses to all questions of some records, batch by batch."""

    generator: Generator
    layout: ResponseLayout
    head: nn.Module
    features: ImageFeatures
    records: Sequence[Record]
    batch_images: int
    calibration: NormCalibrationConfig
    conditions: tuple[str, ...] = WRITING_CONDITIONS
    _written: dict[str, list[Written]] = field(default_factory=dict)

    def read(self, condition: str) -> Outcome:
        """Hits of all questions under a condition; likelihoods are not measured."""
        questions = [question for record in self.records for question in record.questions]
        tokenizer = self.layout.prompt.tokenizer
        hits = []
        for question, response in zip(questions, self.responses(condition), strict=True):
            # As tokens and back, so that spelling which the tokenizer does not keep cannot make an answer wrong.
            gold = tokenizer.decode(tokenizer(question.answer, add_special_tokens=False)["input_ids"]).strip()
            hits.append(float(response.ended and self.layout.answer(response.text(tokenizer)) == gold))
        nothing_N = np.full(len(hits), np.nan)
        return Outcome(np.array(hits), nothing_N, nothing_N)

    def norms(self) -> dict[str, float]:
        """Mean L2 norms of latents as they were fed back (absent without any) and of visual embeddings; share of
        responses with a span.
        """
        found = {name: [_latents(r) for r in self.responses(name)] for name in ("normal", "calibrated")}
        norms = {name: [float(v.float().norm()) for one in every for v in one] for name, every in found.items()}
        visual = [
            float(norm)
            for chunk in batched(self.records, self.batch_images)
            for norm in torch.cat(self.features.of_records(chunk).tokens).float().norm(dim=-1)
        ]
        means = {name: float(np.mean(values)) for name, values in norms.items() if values}
        spans = float(np.mean([len(latents) > 0 for latents in found["normal"]]))
        return {**means, "visual embeddings": float(np.mean(visual)), "spans": spans}

    def responses(self, condition: str) -> list[Written]:
        """The response to every question, written once for each condition."""
        if condition not in self._written:
            given = self._latents_of_others() if condition == "other_images" else None
            self._written[condition] = self._respond(condition, given)
        return self._written[condition]

    @torch.no_grad()
    def _respond(self, condition: str, given_NKD: Tensor | None) -> list[Written]:
        self.generator.train(False)
        calibrate = NormCalibration(self.calibration) if condition == "calibrated" else None
        responses: list[Written] = []
        for chunk in batched(self.records, self.batch_images):
            tokens = self.features.of_records(chunk)
            norms_B = None if calibrate is None else calibrate.observe(tokens)
            asked = [(b, question) for b, record in enumerate(chunk) for question in record.questions]
            branches = [self.layout.branch(question, None, has_span=False) for _, question in asked]
            owners = [b for b, _ in asked]
            rows = GrowingRows.after_images(self.generator.model, tokens).select(owners)
            rows.append_tokens([branch.token_ids[: branch.answer_start] for branch in branches])
            spans = self.layout.spans(
                self.head,
                None if norms_B is None else norms_B[owners],
                None if given_NKD is None else given_NKD[len(responses) : len(responses) + len(asked)],
            )
            end_ids = sorted({branch.token_ids[-1] for branch in branches})
            never = condition == "latents_removed"
            choose = _without(self.layout.open_id) if never else greedy
            responses += generate(rows, end_ids, self.layout.max_positions, choose, None if never else spans)
        return responses

    def _latents_of_others(self) -> Tensor:
        """(N, K, D): each question's are those in the response to the next question of another record; else zeros."""
        latents = [_latents(response) for response in self.responses("normal")]
        n, n_latents = len(latents), len(self.layout.slots)
        owners = [b for b, record in enumerate(self.records) for _ in record.questions]
        given_NKD = torch.zeros(n, n_latents, self.generator.model.width, dtype=self.generator.model.dtype)
        for i in range(n):
            following = ((i + k) % n for k in range(1, n))
            donor = next((j for j in following if owners[j] != owners[i] and len(latents[j]) == n_latents), None)
            if donor is not None:
                given_NKD[i] = torch.stack(latents[donor])
        return given_NKD.to(self.generator.model.device)


def _latents(response: Written) -> list[Tensor]:
    return [piece for piece in response.pieces if isinstance(piece, Tensor)]


def _without(token: int) -> Callable[[Tensor, Sequence[int], int], Tensor]:
    """Greedy words without this one."""

    def choose(logits_BV: Tensor, rows: Sequence[int], step: int) -> Tensor:
        banned_V = torch.arange(logits_BV.shape[1], device=logits_BV.device) == token
        return greedy(logits_BV.masked_fill(banned_V, -torch.inf), rows, step)

    return choose
