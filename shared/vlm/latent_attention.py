"""Where in the image each latent looks: attention from the generator's K latent positions.

Only the latents' rows are computed, by an attention function that otherwise leaves the work to PyTorch's fused kernel:
eager attention would keep a T×T matrix for every head and layer.

Legend: B images, L layers, K latents, T row length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from shared.errors import ModelError
from shared.vlm.attention import attention_of, last_queries
from shared.vlm.generator import Generator

AttentionRule = Literal["mean", "last", "rollout"]
RULES: dict[AttentionRule, str] = {
    "mean": "mean over all heads and layers",
    "last": "mean over the heads of the last layer",
    "rollout": "rollout over layers (Abnar & Zuidema 2020, mean over heads), in which only the latents' own rows mix",
}


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """One image: attention of its latents over the whole row, averaged over heads, and where its image tokens lie.

    weights_LKT: float32 on the CPU; the last K columns are the latents themselves. grid: (rows, columns).
    """

    weights_LKT: Tensor
    first_image_column: int
    grid: tuple[int, int]


@torch.no_grad()
def latent_attention(generator: Generator, images: Sequence[Image.Image]) -> list[LatentAttention]:
    """Attention of the K latent queries, one entry per image, in evaluation mode.

    Not while another thread uses the generator: the attention function is switched for the call. Raises ModelError if
    the image tokens lie on no grid.
    """
    generator.train(False)
    tokens = generator.image_tokens_from(generator.model.image_inputs(images))
    grids = [
        grid or _square(len(image_tokens), generator.model.path)
        for grid, image_tokens in zip(tokens.grids, tokens.tokens, strict=True)
    ]
    with attention_of(generator.model.decoder, last_queries(generator.n_latents)) as layers:
        generator.emit(tokens)
    weights_BLKT = torch.stack(layers, dim=1).float().cpu()
    first = len(generator.model.prompt.prefix_ids)
    return [LatentAttention(weights_LKT, first, grid) for weights_LKT, grid in zip(weights_BLKT, grids, strict=True)]


def attention_map(attention: LatentAttention, rule: AttentionRule) -> Tensor:
    """(K, rows, columns) share of each latent's attention that falls on each image token; the rest is text."""
    weights_LKT = attention.weights_LKT
    if rule == "mean":
        weights_KT = weights_LKT.mean(dim=0)
    elif rule == "last":
        weights_KT = weights_LKT[-1]
    else:
        weights_KT = _rollout(weights_LKT)
    rows, columns = attention.grid
    first = attention.first_image_column
    map_KIJ: Tensor = weights_KT[:, first : first + rows * columns].unflatten(1, (rows, columns))
    return map_KIJ


def _rollout(weights_LKT: Tensor) -> Tensor:
    """(K, T) shares of the input positions in the latents: R ← ½ R + ½ (A_text&image + A_latents R), layer by layer.

    The half of R is the residual connection (Abnar & Zuidema 2020, "Quantifying attention flow in transformers",
    eq. 1-2). Positions other than latents count as themselves in every layer, since their rows are not computed.
    """
    n = weights_LKT.shape[1]
    rollout_KT = torch.zeros_like(weights_LKT[0])
    rollout_KT[:, -n:] = torch.eye(n)
    for weights_KT in weights_LKT:
        others_KT = weights_KT.clone()
        others_KT[:, -n:] = 0
        rollout_KT = 0.5 * rollout_KT + 0.5 * (others_KT + weights_KT[:, -n:] @ rollout_KT)
    return rollout_KT


def _square(n_tokens: int, model: str) -> tuple[int, int]:
    side = math.isqrt(n_tokens)
    if side * side != n_tokens:
        raise ModelError(f"{model}: {n_tokens} image tokens lie on no single grid, so attention has no map")
    return side, side
