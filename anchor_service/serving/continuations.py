"""Next-token distributions after the same answer, for anchors that decode jointly.

A call names the whole answer so far, so any replica can serve it; one that served the token before still has the
answer's keys and values and computes a single column.

Legend: N answers, V vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from anchor_service.serving.engine import read_latents
from shared.packing import Media
from shared.vlm import GrowingRows, VisionLanguageModel

Key = tuple[str, str, tuple[int, ...]]
"""Image, question, answer so far."""


class Continuations:
    """Owned by the anchor's thread. capacity: answers whose keys and values stay, the last used ones."""

    def __init__(self, model: VisionLanguageModel, media: Media, capacity: int):
        self.columns = 0
        """Computed so far."""
        self._model = model
        self._media = media
        self._capacity = capacity
        self._kept: OrderedDict[Key, GrowingRows] = OrderedDict()

    @torch.no_grad()
    def next_logprobs(
        self, image: str, latents_KD: np.ndarray, question: str, answers: Sequence[tuple[int, ...]]
    ) -> np.ndarray:
        """(N, V) float32 log-probabilities of the token after each of N answers to one question."""
        found = [self._longest_kept((image, question, answer)) for answer in answers]
        if any(rows is None for rows, _ in found):
            opened = self._opened(latents_KD, question)
            self._keep((image, question, ()), opened)
            found = [(opened, 0) if rows is None else (rows, n) for rows, n in found]
        new = [answer[n:] for answer, (_, n) in zip(answers, found, strict=True)]
        rows = GrowingRows.joined([one for one, _ in found if one is not None])
        if any(new):
            assert all(new), "answers of one call have the same length"
            rows.append_tokens(new)
            self.columns += sum(map(len, new))
            for i, answer in enumerate(answers):
                self._keep((image, question, answer), rows.select([i]))
        logits_NV = F.linear(rows.hidden_BD, *self._model.head()).float()
        logprobs_NV: np.ndarray = logits_NV.log_softmax(dim=-1).cpu().numpy()
        return logprobs_NV

    def _longest_kept(self, key: Key) -> tuple[GrowingRows | None, int]:
        """The row of the answer, of the answer without its last token, or of the question; how long its answer is."""
        image, question, answer = key
        for known in (answer, answer[:-1], ()):
            if (image, question, known) in self._kept:
                self._kept.move_to_end((image, question, known))
                return self._kept[image, question, known], len(known)
        return None, 0

    def _opened(self, latents_KD: np.ndarray, question: str) -> GrowingRows:
        rows = read_latents(self._model, [latents_KD], self._media)
        opening, _ = self._model.prompt.opening(question)
        rows.append_tokens([opening])
        self.columns += len(opening)
        return rows

    def _keep(self, key: Key, rows: GrowingRows) -> None:
        self._kept[key] = rows
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
