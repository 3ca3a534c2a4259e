"""Shared-prefix packing: one row per record, with every question as a branch behind one prefix.

A row is laid out as

    prefix | media | branch 1 | branch 2 | … | padding

where media are the embeddings of the record's images (latents or real image tokens), one image after the other with
the template's own tokens between two of them. A branch sees the prefix, the media and itself, never another branch,
and its positions continue after the media as if it stood alone. So Q questions cost one prefix instead of Q, and every
number equals that of Q separate rows up to rounding. A prefix whose keys and values are known already
(`shared.vlm.prefix`) takes no columns at all: positions and mask count it, no more.

Pure tensor code: knows neither models nor tokenizers.

Legend: B rows, T row length, S keys of a row (T and a cached prefix), N answer tokens of all rows together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PADDING, PREFIX = -1, 0
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Branch:
    """Token ids of one question with its answer, from the end of the media to the end of turn.

    token_ids[answer_start:] are the answer tokens followed by the one end-of-turn token. header_start: where the
    question has ended, and what the template puts before an answer begins; 0 where nobody asks.
    """

    token_ids: tuple[int, ...]
    answer_start: int
    header_start: int = 0

    @property
    def n_answer(self) -> int:
        """Answer tokens, the end-of-turn token included."""
        return len(self.token_ids) - self.answer_start


@dataclass(frozen=True, slots=True)
class Media:
    """Where one image's embeddings go: `length` columns, on a `grid` of (rows, columns) or one after the other."""

    length: int
    grid: tuple[int, int] | None = None

    @property
    def extent(self) -> int:
        """How far the media advance the position counter (mRoPE: the longer side of the grid)."""
        return max(self.grid) if self.grid else self.length


@dataclass(frozen=True, slots=True)
class PackedRows:
    """B packed rows of T columns, ready for a decoder.

    token_ids_BT: ids to embed; 0 at media columns and padding.
    segments_BT: PADDING, PREFIX (prefix, media and what stands between them), or 1 … Q for the branches.
    positions_3BT: temporal, height and width positions; equal for everything but media on a grid.
    media_BT: True at the columns that media embeddings fill, row by row, in order.
    predict_N2: (row, column) whose hidden state predicts answer token n.
    targets_N: the answer tokens, ordered by row, question, token.
    counts: answer tokens per row and question, to cut N back into lists.
    n_cached: prefix tokens before the first column, whose keys and values the decoder is given.
    """

    token_ids_BT: Tensor
    segments_BT: Tensor
    positions_3BT: Tensor
    media_BT: Tensor
    predict_N2: Tensor
    targets_N: Tensor
    counts: list[list[int]]
    n_cached: int = 0

    def to(self, device: torch.device | str) -> PackedRows:
        """The same rows on `device`."""
        return PackedRows(
            self.token_ids_BT.to(device),
            self.segments_BT.to(device),
            self.positions_3BT.to(device),
            self.media_BT.to(device),
            self.predict_N2.to(device),
            self.targets_N.to(device),
            self.counts,
            self.n_cached,
        )


def latent_media(n_latents: int, on_grid: bool) -> Media:
    """Media of K latents. Raises ValueError if a grid is asked for and K is no square."""
    if not on_grid:
        return Media(n_latents)
    side = math.isqrt(n_latents)
    if side * side != n_latents:
        raise ValueError(f"latent_positions: grid needs a square number of latents, got {n_latents}")
    return Media(n_latents, (side, side))


def pack_rows(
    prefix_ids: Sequence[int],
    media: Sequence[Sequence[Media]],
    branches: Sequence[Sequence[Branch]],
    between_ids: Sequence[int] = (),
    cache_prefix: bool = False,
) -> PackedRows:
    """Lay out the rows. `media` (a row's images, perhaps none) and `branches` have one entry per row.

    between_ids: tokens between two images of a row. cache_prefix: leave the prefix out of the rows, because the decoder
    is given its keys and values.
    """
    n_cached = len(prefix_ids) if cache_prefix else 0
    prefix_ids = prefix_ids[n_cached:]
    if len(media) != len(branches):
        raise ValueError(f"{len(media)} rows of images but {len(branches)} lists of questions")
    preludes = [_prelude(row, between_ids) for row in media]
    n_prefix, n_media = len(prefix_ids), max((len(prelude.token_ids) for prelude in preludes), default=0)
    n_before_media = n_cached + n_prefix
    # The last token of a branch is only ever a target, so it takes no column.
    row_lengths = [n_prefix + n_media + sum(len(b.token_ids) - 1 for b in row) for row in branches]
    n_rows, n_columns = len(branches), max(row_lengths, default=0)
    token_ids = np.zeros((n_rows, n_columns), dtype=np.int64)
    segments = np.full((n_rows, n_columns), PADDING, dtype=np.int64)
    positions = np.zeros((3, n_rows, n_columns), dtype=np.int64)
    is_media = np.zeros((n_rows, n_columns), dtype=bool)
    predict: list[np.ndarray] = []
    targets: list[int] = []

    token_ids[:, :n_prefix] = prefix_ids
    segments[:, :n_prefix] = PREFIX
    positions[:, :, :n_prefix] = np.arange(n_prefix)
    for r, (prelude, row) in enumerate(zip(preludes, branches, strict=True)):
        columns = slice(n_prefix, n_prefix + len(prelude.token_ids))
        token_ids[r, columns] = prelude.token_ids
        segments[r, columns] = PREFIX
        is_media[r, columns] = prelude.is_media
        positions[:, r, columns] = n_before_media + prelude.positions
        column = n_prefix + n_media
        for q, branch in enumerate(row, start=1):
            n = len(branch.token_ids) - 1
            token_ids[r, column : column + n] = branch.token_ids[:-1]
            segments[r, column : column + n] = q
            positions[:, r, column : column + n] = n_before_media + prelude.extent + np.arange(n)
            predicting = column + np.arange(branch.answer_start - 1, n)
            predict.append(np.stack([np.full_like(predicting, r), predicting], axis=1))
            targets.extend(branch.token_ids[branch.answer_start :])
            column += n
    return PackedRows(
        token_ids_BT=torch.from_numpy(token_ids),
        segments_BT=torch.from_numpy(segments),
        positions_3BT=torch.from_numpy(positions),
        media_BT=torch.from_numpy(is_media),
        predict_N2=torch.from_numpy(np.concatenate(predict) if predict else np.zeros((0, 2), dtype=np.int64)),
        targets_N=torch.tensor(targets, dtype=torch.long),
        counts=[[branch.n_answer for branch in row] for row in branches],
        n_cached=n_cached,
    )


@dataclass(frozen=True, slots=True)
class _Prelude:
    """What stands between prefix and branches: token ids (0 at media), which of them are media, (3, length) positions.

    extent: how far all of it advances the position counter.
    """

    token_ids: np.ndarray
    is_media: np.ndarray
    positions: np.ndarray
    extent: int


def _prelude(media: Sequence[Media], between_ids: Sequence[int]) -> _Prelude:
    ids, is_media, positions = [], [], []
    extent, n_between = 0, len(between_ids)
    for i, medium in enumerate(media):
        if i > 0:
            ids.append(np.asarray(between_ids, dtype=np.int64))
            is_media.append(np.zeros(n_between, dtype=bool))
            positions.append(np.broadcast_to(extent + np.arange(n_between), (3, n_between)))
            extent += n_between
        ids.append(np.zeros(medium.length, dtype=np.int64))
        is_media.append(np.ones(medium.length, dtype=bool))
        positions.append(extent + _media_positions(medium))
        extent += medium.extent
    if not ids:
        return _Prelude(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool), np.zeros((3, 0), dtype=np.int64), 0)
    return _Prelude(np.concatenate(ids), np.concatenate(is_media), np.concatenate(positions, axis=1), extent)


def _media_positions(medium: Media) -> np.ndarray:
    """(3, length) temporal, height and width positions, counted from the first media column."""
    if medium.grid is None:
        return np.broadcast_to(np.arange(medium.length), (3, medium.length))
    rows, columns = np.divmod(np.arange(medium.length), medium.grid[1])
    return np.stack([np.zeros(medium.length, dtype=np.int64), rows, columns])


def block_mask(segments_BT: Tensor, n_cached: int = 0) -> Tensor:
    """(B, 1, T, S) boolean mask, True where a query (row) may see a key (column).

    A key is visible if it does not lie in the future and belongs to the prefix or to the query's own branch.
    Padding sees itself, and a cached prefix: a row without any key would turn into NaN.
    """
    n = segments_BT.shape[1]
    query_BT1, key_B1T = segments_BT.unsqueeze(2), segments_BT.unsqueeze(1)
    causal_TT = torch.ones(n, n, dtype=torch.bool, device=segments_BT.device).tril()
    visible_BTT = causal_TT & ((key_B1T == PREFIX) | (key_B1T == query_BT1)) & (key_B1T != PADDING)
    visible_BTT |= torch.eye(n, dtype=torch.bool, device=segments_BT.device)
    return F.pad(visible_BTT, (n_cached, 0), value=True).unsqueeze(1)


def unpack(values: Sequence[Value], counts: Sequence[Sequence[int]]) -> list[list[list[Value]]]:
    """Cut a flat sequence of N token values back into images, questions and tokens."""
    flat = iter(values)
    return [[[next(flat) for _ in range(n)] for n in row] for row in counts]
