"""Latents written one after the other: each is predicted from the hidden state before it and read as the next input.

    … <latent>  →  v_1 = head(h(<latent>))  →  v_2 = head(h(v_1))  →  …  →  v_K,  h(v_K) predicts what follows

One forward of a single position per latent; what was read before stays as keys and values (`GrowingRows`), in training
as part of the graph.

Legend: B rows, K latents, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from shared.errors import ConfigError, ModelError
from shared.packing import latent_media, pack_rows
from shared.vlm import GrowingRows, VisionLanguageModel
from trainer.norm_calibration import rescale

TOKEN_BUDGETS = (4, 9, 16, 36, 64, 144)
"""Latents of a span, as square grids."""

LatentHead = Callable[[Tensor], Tensor]
"""Hidden state (B, D) to fed-back latent (B, D): a module of `trainer.gap.heads`."""


def latent_positions(n_latents: int, on_grid: bool) -> Tensor:
    """(3, K) temporal, height and width positions of a span, counted from the position of its first latent.

    On a grid they are those of an image of √K × √K tokens. Raises ConfigError if K is then no square.
    """
    if on_grid and math.isqrt(n_latents) ** 2 != n_latents:
        budgets = ", ".join(map(str, TOKEN_BUDGETS))
        raise ConfigError(f"a grid of {n_latents} latents is no square; use one of the token budgets {budgets}")
    return pack_rows([], [[latent_media(n_latents, on_grid)]], [[]]).positions_3BT[:, 0]


def check_grid(model: VisionLanguageModel) -> None:
    """Raises ModelError for a model whose positions have one axis, where a grid would put all latents in one place."""
    if not model.family.uses_mrope:
        raise ModelError(
            f"{model.path}: family {model.family.name} has no image grid; number latents one after the other"
        )


def generate_latents(
    rows: GrowingRows, n_latents: int, head: LatentHead, on_grid: bool = False, norms_B: Tensor | None = None
) -> Tensor:
    """(B, K, D) latents as they were fed back; `rows` then end with the last of them.

    norms_B: rescale every latent before it is fed back (see `trainer.norm_calibration.rescale`).
    """
    if on_grid:
        check_grid(rows.model)
    positions_3BK = rows.next_B[:, None] + latent_positions(n_latents, on_grid).to(rows.next_B.device).unsqueeze(1)
    latents = []
    for k in range(n_latents):
        latent_BD = rescale(head(rows.hidden_BD), norms_B).to(rows.model.dtype)
        rows.append(latent_BD.unsqueeze(1), positions_3BK[:, :, k : k + 1])
        latents.append(latent_BD)
    return torch.stack(latents, dim=1)
