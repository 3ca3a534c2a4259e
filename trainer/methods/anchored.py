"""`anchored`: latents that frozen anchors can read in place of the image.

    L = w_nll(t) · NLL_multi + w_concept · L_concept + w_norm(t) · L_norm

NLL_multi: every anchor's answers, through the bridge. L_concept: an MLP of each latent points where the visual
tokens of its region point. L_norm: latents keep the length of the anchors' own visual tokens. Both ramps run
over the first `loss.ramp_steps` steps on a half cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from anchor_service.pool import AnchorPool
from shared.config import Config, Section
from shared.errors import NonFiniteError
from shared.messages import Gradient
from shared.vlm import ImageTokens, nearly_square, pooled_image_tokens
from shared.vlm.generator import Generator
from trainer.bridge import AnchorBridge, PendingRead
from trainer.data.records import Record
from trainer.data.sampling import Batch
from trainer.evaluation.reading import mean_nll
from trainer.image_features import ImageFeatures
from trainer.losses import ConceptHead, concept_loss, half_cosine, nll_multi, norm_loss
from trainer.methods.base import LossParts, Method


@dataclass(frozen=True, slots=True)
class Emitted:
    """A batch whose latents are written and being read. latents_BKD are part of the generator's graph."""

    tokens: ImageTokens
    latents_BKD: Tensor
    read: PendingRead


class AnchoredOptions(Section):
    """What `anchored` has beside `loss`."""

    norm_target: Literal["visual", "random"] = Field(
        "visual", description="random: the control in which every image at every step has a target of its own."
    )


class AnchoredMethod(Method):
    """Generator → latents → bridge → loss. Holds the concept head, the only extra weights."""

    Options = AnchoredOptions
    latents_of = "image"
    suites = ("reading", "causal", "controls", "geometry", "transfer", "benchmarks")

    def __init__(self, config: Config, generator: Generator, pool: AnchorPool):
        super().__init__(config, generator, pool)
        self.options = AnchoredOptions.model_validate(config.options)
        self._bridge = AnchorBridge(pool, Gradient(config.pool.mode), config.pool.count_end_of_turn)
        self._image_norm = mean_image_norm(pool)
        torch.manual_seed(config.train.seed)
        self.head = ConceptHead(generator.model.width).to(generator.model.device)

    @property
    def extra_modules(self) -> nn.Module:
        return self.head

    def prepare(self, features: ImageFeatures, records: Sequence[Record]) -> None:
        """Give the latents the length of the anchors' visual tokens."""
        if self._config.generator.calibrate_norm:
            self._generator.calibrate_norm(features.of_records(records), self._image_norm)

    def emit(self, batch: Batch, tokens: ImageTokens, step: int) -> Emitted:
        """Write the latents of one batch and send them to the anchors. Raises NonFiniteError naming records."""
        latents_BKD = self._generator.emit(tokens)
        _check_finite(latents_BKD, batch)
        questions = [[question.message for question in row] for row in batch.questions]
        return Emitted(tokens, latents_BKD, self._bridge.submit(latents_BKD, questions))

    def loss(self, emitted: Emitted, step: int) -> LossParts:
        """The loss of an emitted batch, once the anchors have answered. Raises whatever the pool raises."""
        w = self._config.loss
        read = emitted.read.output()
        target_BKD = pooled_image_tokens(emitted.tokens, nearly_square(self._generator.n_latents))

        nll = nll_multi(read.nll_RB, read.weights_R)
        concept = concept_loss(self.head(emitted.latents_BKD), target_BKD)
        norm = norm_loss(emitted.latents_BKD, self._norm_target(len(emitted.latents_BKD), step))
        total = (
            half_cosine(step, w.ramp_steps, w.nll_start, w.nll) * nll
            + w.concept * concept
            + half_cosine(step, w.ramp_steps, w.norm_start, w.norm) * norm
        )
        terms = {f"nll/{name}": v for name, v in zip(read.replies, read.nll_RB.mean(1).tolist(), strict=True)}
        terms |= {"nll": nll.item(), "concept": concept.item(), "norm": norm.item(), "loss": total.item()}
        return LossParts(total, terms, read.replies)

    def _norm_target(self, n_images: int, step: int) -> float | Tensor:
        """μ, or for the control μ · 4^u with u uniform in ±1, drawn anew from seed and step."""
        if self.options.norm_target == "visual":
            return self._image_norm
        factors = 4.0 ** np.random.default_rng([self._config.train.seed, 3, step]).uniform(-1, 1, (n_images, 1))
        return self._image_norm * torch.from_numpy(factors).float().to(self._generator.model.device)

    def validation_loss(self, features: ImageFeatures, records: Sequence[Record]) -> float:
        """Mean NLL over anchors, weighted as in training."""
        nll = mean_nll(self._generator, features, self._pool, records, self._config)
        weights = self._pool.weights()
        return sum(weights[name] * value for name, value in nll.items())


def mean_image_norm(pool: AnchorPool) -> float:
    """μ of the norm loss: the mean L2 norm of visual tokens, over the anchors."""
    norms = [h.image_norm for h in pool.handshakes.values() if h.image_norm is not None]
    return sum(norms) / len(norms)


def _check_finite(latents_BKD: Tensor, batch: Batch) -> None:
    bad_B = ~torch.isfinite(latents_BKD).flatten(1).all(dim=1)
    if bad_B.any():
        names = [record.record_id for record, bad in zip(batch.records, bad_B.tolist(), strict=True) if bad]
        raise NonFiniteError(
            f"latents of {', '.join(names[:5])} are NaN or infinite; check these images, or lower train.lr_lora"
        )
