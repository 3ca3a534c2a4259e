"""Visual tokens averaged over regions of the image, so that models with different grids can be compared.

Legend: B rows, C cells (regions), D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.vlm.model import ImageTokens


def nearly_square(n_cells: int) -> tuple[int, int]:
    """The most nearly square grid (rows ≤ columns) of exactly n cells."""
    rows = max(r for r in range(1, math.isqrt(n_cells) + 1) if n_cells % r == 0)
    return rows, n_cells // rows


def pooled_image_tokens(tokens: ImageTokens, grid: tuple[int, int]) -> Tensor:
    """(B, C, D) visual tokens pooled by area into a grid of (rows, columns), row by row, float32.

    All regions together cover the image. A grid as large as the tokens' own gives the tokens themselves. Several images
    of a row count as one picture: made equally large and laid side by side.
    """
    maps_DHW = []
    for image, own_grid in zip(tokens.tokens, tokens.grids, strict=True):
        rows, columns = own_grid or _grid_of(len(image))
        map_DHW = image[: rows * columns].float().T.unflatten(1, (rows, columns))
        maps_DHW.append(F.adaptive_avg_pool2d(map_DHW, grid))
    side_by_side = [torch.cat(maps_DHW[row], dim=2) for row in tokens.rows]
    return torch.stack([F.adaptive_avg_pool2d(map_DHW, grid).flatten(1).T for map_DHW in side_by_side])


def _grid_of(n_tokens: int) -> tuple[int, int]:
    """The square that n tokens fill; else one line (families whose tokens carry row separators)."""
    side = math.isqrt(n_tokens)
    return (side, side) if side * side == n_tokens else (1, n_tokens)
