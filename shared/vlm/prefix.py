"""Keys and values of the prompt's constant part: the tokens before the image, the same in every row and every call.

A frozen model computes them once. Its rows then begin with the media, and no gradient passes through the prefix.

Legend: B rows, H key heads, P prefix tokens, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from shared.vlm.model import VisionLanguageModel


class CachedPrefix:
    """Of one frozen model. Computed when first asked for, and again when template, dtype or device have changed.

    Weights are taken for constant: a model that trains has no constant prefix.
    """

    def __init__(self, model: VisionLanguageModel):
        self._model = model
        self._key: object = None
        self._layers: list[tuple[Tensor, Tensor]] = []

    def for_rows(self, n_rows: int) -> DynamicCache:
        """A cache of its own for one pass over `n_rows` rows: per layer keys and values (B, H, P, D)."""
        key = (tuple(self._model.prompt.prefix_ids), self._model.dtype, self._model.device)
        if key != self._key:
            self._layers, self._key = self._compute(), key
        cache = DynamicCache()
        for i, (keys_1HPD, values_1HPD) in enumerate(self._layers):
            cache.update(keys_1HPD.expand(n_rows, -1, -1, -1), values_1HPD.expand(n_rows, -1, -1, -1), i)
        return cache

    @torch.no_grad()
    def _compute(self) -> list[tuple[Tensor, Tensor]]:
        ids_1P = torch.tensor([self._model.prompt.prefix_ids], dtype=torch.long, device=self._model.device)
        n_tokens = ids_1P.shape[1]
        causal_11PP = torch.ones(1, 1, n_tokens, n_tokens, dtype=torch.bool, device=self._model.device).tril()
        positions_31P = torch.arange(n_tokens, device=self._model.device).expand(3, 1, -1)
        cache = DynamicCache()
        self._model.decode_embeddings(self._model.embed(ids_1P), causal_11PP, positions_31P, past_key_values=cache)
        return [(layer.keys, layer.values) for layer in cache.layers]
