"""Responses token by token, with spans of latents in them where the model opens one.

    words … <latent> v_1 … v_K </latent> words … end of turn

Rows are written together, each in its own state, one position a step; a row that has ended leaves the batch. Rows
share what they branched from: read an image once, `GrowingRows.select` it for every question and every sample.

Legend: B rows, V vocabulary, K latents, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.vlm import GrowingRows
from trainer.gap.autoregressive import LatentHead, check_grid, latent_positions
from trainer.gap.response import PLACEHOLDER
from trainer.norm_calibration import rescale

Choose = Callable[[Tensor, Sequence[int], int], Tensor]
"""(logits (B, V), the number of each row, step) → the next token of each row (B,)."""


@dataclass(frozen=True, slots=True)
class LatentSpans:
    """When a row writes latents instead of words.

    open_id, close_id: tokens that stand around a span. closing: after exactly `n_latents`, or by the token that the
    model chooses, after at most that many. norms_B: see `generate_latents`. given_BKD: fed back instead of the head's.
    """

    open_id: int
    close_id: int
    head: LatentHead
    n_latents: int
    closing: Literal["budget", "generated"] = "budget"
    on_grid: bool = False
    norms_B: Tensor | None = None
    given_BKD: Tensor | None = None


@dataclass(slots=True)
class Written:
    """One row's response: token ids and latents (D,) in order, without the end of turn.

    ended: whether the model ended its turn; otherwise the limit of positions did.
    """

    pieces: list[int | Tensor] = field(default_factory=list)
    ended: bool = False

    def text(self, tokenizer: Any) -> str:
        """Words, with one placeholder for each latent."""
        parts: list[str] = []
        token_ids: list[int] = []
        for piece in [*self.pieces, None]:
            if isinstance(piece, int):
                token_ids.append(piece)
                continue
            if token_ids:
                parts.append(tokenizer.decode(token_ids, skip_special_tokens=False))
                token_ids = []
            if piece is not None:
                parts.append(PLACEHOLDER)
        return "".join(parts)


def greedy(logits_BV: Tensor, _rows: Sequence[int], _step: int) -> Tensor:
    """The most probable token of each row."""
    return logits_BV.argmax(dim=-1)


class Sampler:
    """Draws from softmax(logits / temperature), each row from random numbers of its own.

    seeds: of each row; what a row draws depends on its seed and its logits alone, not on the rows beside it.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, max_tokens: int):
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self._temperature = temperature
        draws = [np.random.default_rng(seed).random(max_tokens) for seed in seeds]
        self._draws_BT = torch.from_numpy(np.stack(draws))

    def __call__(self, logits_BV: Tensor, rows: Sequence[int], step: int) -> Tensor:
        """The token at which the cumulative probability passes the row's number."""
        draws_B = self._draws_BT[torch.as_tensor(rows), step].to(logits_BV.device)
        cumulative_BV = (logits_BV.double() / self._temperature).softmax(dim=-1).cumsum(dim=-1)
        # The sum may end a rounding below 1; a draw beyond it takes the last token with any probability.
        draws_B = torch.minimum(draws_B, cumulative_BV[:, -1].nextafter(torch.zeros_like(draws_B)))
        return torch.searchsorted(cumulative_BV, draws_B.unsqueeze(1), right=True).squeeze(1)


@torch.no_grad()
def generate(
    rows: GrowingRows, end_ids: Sequence[int], max_positions: int, choose: Choose, spans: LatentSpans | None = None
) -> list[Written]:
    """Go on with every row until it chooses a token of `end_ids` or has written `max_positions` tokens and latents.

    `rows` are used up. Inside of a span only its closing counts, no other choice of the model.
    """
    written = [Written() for _ in range(len(rows))]
    numbers = list(range(len(rows)))
    span = None if spans is None else _OpenSpans(spans, rows)
    for step in range(max_positions):
        chosen = choose(F.linear(rows.hidden_BD, *rows.model.head()), numbers, step).tolist()
        going_on = [
            i
            for i, (row, token) in enumerate(zip(numbers, chosen, strict=True))
            if token not in end_ids or (span is not None and span.is_open(row))
        ]
        if len(going_on) < len(numbers):
            for i in set(range(len(numbers))) - set(going_on):
                written[numbers[i]].ended = True
            if not going_on:
                break
            rows = rows.select(going_on)
            numbers, chosen = [numbers[i] for i in going_on], [chosen[i] for i in going_on]
        if span is None:
            pieces: Sequence[int | Tensor] = chosen
            rows.append_tokens([[token] for token in chosen])
        else:
            pieces = span.append(rows, numbers, chosen)
        for row, piece in zip(numbers, pieces, strict=True):
            written[row].pieces.append(piece)
    return written


class _OpenSpans:
    """Which rows are inside of a span, with how many latents, and where theirs began."""

    def __init__(self, spans: LatentSpans, rows: GrowingRows):
        if spans.on_grid:
            check_grid(rows.model)
        self._spans = spans
        self._places_3K = latent_positions(spans.n_latents, spans.on_grid).to(rows.model.device)
        self._n_written: dict[int, int] = {}
        self._began_at: dict[int, Tensor] = {}

    def is_open(self, row: int) -> bool:
        return row in self._n_written

    def append(self, rows: GrowingRows, numbers: Sequence[int], chosen: Sequence[int]) -> list[int | Tensor]:
        """Give each row its next token or latent; returns what it was."""
        tokens = [self._token(row, token) for row, token in zip(numbers, chosen, strict=True)]
        embeds_BD = rows.model.embed(torch.tensor([token or 0 for token in tokens], device=rows.model.device))
        positions_3B = rows.next_B.expand(3, -1).clone()
        pieces: list[int | Tensor] = []
        latents_BD = self._latents(rows, numbers) if None in tokens else embeds_BD
        for i, (row, token) in enumerate(zip(numbers, tokens, strict=True)):
            if token is None:
                embeds_BD[i] = latents_BD[i]
                positions_3B[:, i] = self._began_at[row] + self._places_3K[:, self._n_written[row]]
                self._n_written[row] += 1
                pieces.append(latents_BD[i])
            else:
                self._open_or_close(row, token, rows.next_B[i] + 1)
                pieces.append(token)
        rows.append(embeds_BD.unsqueeze(1), positions_3B.unsqueeze(2))
        return pieces

    def _token(self, row: int, chosen: int) -> int | None:
        """The token that a row reads next; None where it reads a latent."""
        if not self.is_open(row):
            return chosen
        closes = self._spans.closing == "generated" and chosen == self._spans.close_id
        return self._spans.close_id if closes or self._n_written[row] == self._spans.n_latents else None

    def _open_or_close(self, row: int, token: int, next_position: Tensor) -> None:
        if self.is_open(row):
            del self._n_written[row]
        elif token == self._spans.open_id:
            self._n_written[row], self._began_at[row] = 0, next_position

    def _latents(self, rows: GrowingRows, numbers: Sequence[int]) -> Tensor:
        if self._spans.given_BKD is not None:
            # Of rows outside of a span any latent will do: it is not read.
            return self._spans.given_BKD[list(numbers), [self._n_written.get(row, 0) for row in numbers]]
        norms_B = self._spans.norms_B
        norms_B = None if norms_B is None else norms_B[torch.as_tensor(numbers, device=norms_B.device)]
        return rescale(self._spans.head(rows.hidden_BD), norms_B).to(rows.model.dtype)
