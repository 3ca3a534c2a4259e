"""`anchored`: latents that frozen anchors can read in place of the image.

    L = w_nll(t) · NLL_multi + w_concept · L_concept + w_norm(t) · L_norm

NLL_multi: every anchor's answers, through the bridge. L_concept: an MLP of each latent points where the visual
tokens of its region point. L_norm: latents keep the length of the anchors' own visual tokens. Both ramps run
over the first `loss.ramp_steps` steps on a half cosine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shared.config import Config
from shared.errors import NonFiniteError
from shared.messages import ReadReply
from shared.vlm import ImageTokens, nearly_square, pooled_image_tokens
from trainer.bridge import AnchorBridge, PendingRead
from trainer.data.sampling import Batch
from trainer.generator import Generator
from trainer.losses import ConceptHead, concept_loss, half_cosine, nll_multi, norm_loss


@dataclass(frozen=True, slots=True)
class LossParts:
    """A loss to call backward on, its terms in nats or as stated in `trainer.losses`, and the anchors' replies."""

    total: Tensor
    terms: dict[str, float]
    replies: dict[str, ReadReply]


@dataclass(frozen=True, slots=True)
class Emitted:
    """A batch whose latents are written and being read. latents_BKD are part of the generator's graph."""

    tokens: ImageTokens
    latents_BKD: Tensor
    read: PendingRead


class AnchoredMethod:
    """Generator → latents → bridge → loss. Holds the concept head, the only extra weights."""

    def __init__(self, config: Config, generator: Generator, bridge: AnchorBridge, image_norm: float):
        self._config = config
        self._generator = generator
        self._bridge = bridge
        self._image_norm = image_norm
        torch.manual_seed(config.train.seed)
        self.head = ConceptHead(generator.model.width).to(generator.model.device)

    @property
    def extra_modules(self) -> nn.Module:
        """Modules that train beside the generator and are saved with the trainer state."""
        return self.head

    def emit(self, batch: Batch, tokens: ImageTokens) -> Emitted:
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
        norm = norm_loss(emitted.latents_BKD, self._image_norm)
        total = (
            half_cosine(step, w.ramp_steps, w.nll_start, w.nll) * nll
            + w.concept * concept
            + half_cosine(step, w.ramp_steps, w.norm_start, w.norm) * norm
        )
        terms = {f"nll/{name}": v for name, v in zip(read.replies, read.nll_RB.mean(1).tolist(), strict=True)}
        terms |= {"nll": nll.item(), "concept": concept.item(), "norm": norm.item(), "loss": total.item()}
        return LossParts(total, terms, read.replies)


def _check_finite(latents_BKD: Tensor, batch: Batch) -> None:
    bad_B = ~torch.isfinite(latents_BKD).flatten(1).all(dim=1)
    if bad_B.any():
        names = [record.record_id for record, bad in zip(batch.records, bad_B.tolist(), strict=True) if bad]
        raise NonFiniteError(
            f"latents of {', '.join(names[:5])} are NaN or infinite; check these images, or lower train.lr_lora"
        )
