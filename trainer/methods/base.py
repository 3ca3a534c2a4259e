"""What every training method states. The loop knows no more of a method than this class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from anchor_service.pool import AnchorPool
from shared.config import Config, Section
from shared.messages import ReadReply
from shared.vlm import ImageTokens
from shared.vlm.generator import Generator
from trainer.data.records import Record
from trainer.data.sampling import Batch
from trainer.image_features import ImageFeatures
from trainer.losses import lr_share


class NoOptions(Section):
    """Options of a method that has none of its own."""


@dataclass(frozen=True, slots=True)
class LossParts:
    """A loss to call backward on, its terms in nats or as stated in `trainer.losses`, and the anchors' replies."""

    total: Tensor
    terms: dict[str, float]
    replies: dict[str, ReadReply]


class Method(ABC):
    """One instance per run, owned by the main thread.

    Options: what `options` of the config may hold. needs_anchors: whether the loss asks anchors; a method whose
    generator answers by itself may still have some. latents_of: what K latents belong to, None where there are none or
    their number is open. suites: of `evaluate` that make sense for it; `train` ends with the
    first.
    """

    Options: ClassVar[type[Section]] = NoOptions
    needs_anchors: ClassVar[bool] = True
    latents_of: ClassVar[Literal["image", "question"] | None] = None
    suites: ClassVar[tuple[str, ...]]

    def __init__(self, config: Config, generator: Generator, pool: AnchorPool):
        self._config = config
        self._generator = generator
        self._pool = pool

    @property
    def extra_modules(self) -> nn.Module:
        """Modules that train beside the generator and are saved with the trainer state."""
        return nn.Module()

    @staticmethod
    def seen(record: Record) -> Record:
        """The record with all images that training looks at; `emit` gets the tokens of these. Raises DataError."""
        return record

    def prepare(self, features: ImageFeatures, records: Sequence[Record]) -> None:  # noqa: B027
        """Called once with the first training records, before the first step of a new run."""

    def lr_share(self, step: int) -> float:
        """Share of each group's learning rate at a step."""
        t = self._config.train
        return lr_share(step, t.steps, t.warmup_steps, t.final_lr_share)

    def starts_stage(self, step: int) -> bool:
        """Whether a stage of its own begins at a step: the optimizer forgets its moments."""
        return False

    @abstractmethod
    def emit(self, batch: Batch, tokens: ImageTokens, step: int) -> Any:
        """Begin a microbatch: the generator's forward pass, and the calls of anchors. Raises NonFiniteError."""

    @abstractmethod
    def loss(self, emitted: Any, step: int) -> LossParts:
        """The loss of what `emit` gave, once the anchors have answered. Raises whatever the pool raises."""

    @abstractmethod
    def validation_loss(self, features: ImageFeatures, records: Sequence[Record]) -> float:
        """On held-out records, of what inference depends on, in nats; the checkpoint with the lowest is the best."""
