"""Transfer: readers of another family and width, which training never saw, read latents through a projector.

The projector is closed-form (`trainer.evaluation.projector`) and fitted on training images alone. One latent stands
for a region of the image; where the reader has s² tokens of its own for that region, the projector writes all of
them: D → s² · E. So the reader gets as many tokens, in the same order, as for an image.

Two sources to fit on: the generator's visual tokens pooled to K regions, which any model has, and the latents
themselves. If the second does much better, the latents do not lie where visual tokens do.

Legend: B images, K latents, D the generator's width, E the reader's width, C = K · s² tokens of the reader.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anchor_service.pool import AnchorPool
from shared.config import Config, TransferConfig
from shared.messages import PROTOCOL_VERSION, Handshake, LatentPositions
from shared.vlm import nearly_square, vlm_config
from shared.vlm.families import family_of
from shared.vlm.model import DTYPES
from trainer.data.records import Record
from trainer.evaluation.projector import fit_least_squares, fit_procrustes, share_outside_span
from trainer.evaluation.reading import Reader, batched, of_anchor, read_bounds, read_swap, summarise

FIT_IMAGES = 512
_FITS = {"least_squares": fit_least_squares, "procrustes": fit_procrustes}
_HELD_VARIANCE = 0.99


@dataclass(frozen=True, slots=True)
class Regions:
    """K regions of the image in a grid, each of side × side tokens of the reader."""

    rows: int
    columns: int
    side: int

    @classmethod
    def of(cls, n_latents: int, n_tokens: int) -> Regions:
        """For K latents and a reader of C tokens."""
        return cls(*nearly_square(n_latents), math.isqrt(n_tokens // n_latents))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the reader's tokens."""
        return self.rows * self.side, self.columns * self.side

    def gather(self, tokens_BCE: Tensor) -> Tensor:
        """(B, C, E) tokens row by row → (B, K, s² · E), those of each region side by side."""
        tiles = tokens_BCE.unflatten(1, (self.rows, self.side, self.columns, self.side)).transpose(2, 3)
        return tiles.flatten(3, 5).flatten(1, 2)

    def scatter(self, regions_BKF: Tensor) -> Tensor:
        """The inverse of `gather`."""
        tiles = regions_BKF.unflatten(1, (self.rows, self.columns)).unflatten(3, (self.side, self.side, -1))
        return tiles.transpose(2, 3).flatten(1, 4)


def read_through_projectors(
    config: Config,
    reader: TransferConfig,
    records: Sequence[Record],
    latents_BKD: Tensor,
    fit_records: Sequence[Record],
    fit_sources: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Figures of one reader: its own ceiling and floor, and the latents through every projector.

    fit_sources: by name, vectors (B, K, D) of the fit records. outside_span: share of the latents' variance outside
    the directions that hold 99 % of the source's, for which the fit had hardly any evidence.
    """
    regions = Regions.of(latents_BKD.shape[1], reader.tokens)
    with _pool_of(config, reader) as pool:
        embedded = [
            pool.embed_images(reader.name, [record.image_bytes() for record in chunk], regions.grid)
            for chunk in batched(fit_records, config.evaluation.batch_images)
        ]
        target_NF = regions.gather(torch.cat(embedded)).flatten(0, 1)
        split = Reader(pool, records, config)
        bounds = read_bounds(split)
        section: dict[str, Any] = {}
        for source, source_BKD in fit_sources.items():
            source_ND = source_BKD.flatten(0, 1)
            outside = share_outside_span(latents_BKD.flatten(0, 1), source_ND, _HELD_VARIANCE)
            for name, fit in _FITS.items():
                projected_BKF = fit(source_ND, target_NF)(latents_BKD.float().cpu())
                tokens_BCE = regions.scatter(projected_BKF).to(DTYPES[reader.dtype])
                # One swap: every projector reads the whole split again.
                swapped = read_swap(split, tokens_BCE, config.train.seed)
                outcomes = bounds | {"latents": split.latents(tokens_BCE), "swapped": swapped}
                figures = summarise(of_anchor(outcomes, reader.name), split, config)
                section[f"{name} on {source}"] = {**figures, "outside_span": outside}
    return section


def _pool_of(config: Config, reader: TransferConfig) -> AnchorPool:
    """A pool of one anchor that takes C tokens of its own width."""
    model = vlm_config(reader.model)
    on_grid = family_of(model.model_type, reader.model).uses_mrope and math.isqrt(reader.tokens) ** 2 == reader.tokens
    positions = LatentPositions.GRID if on_grid else LatentPositions.TEXT
    adapted = config.model_copy(
        update={
            "generator": config.generator.model_copy(update={"latents": reader.tokens}),
            "pool": config.pool.model_copy(update={"latent_positions": positions}),
        }
    )
    width = model.get_text_config().hidden_size
    sender = Handshake("projector", PROTOCOL_VERSION, reader.tokens, width, reader.dtype, family="", prompt="")
    return AnchorPool.start(adapted, sender, anchors=(reader,))
