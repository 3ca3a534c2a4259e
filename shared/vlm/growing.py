"""Rows that a decoder reads piece by piece: what it has read stays as keys and values, only new columns are computed.

Works with a graph as well as without: keys and values are part of it, so gradients of what is appended last reach what
came first. Rows differ in length; padding stands wherever a row had nothing to add and is never seen again.

Legend: B rows, T new columns, S columns read before, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from shared.errors import ConfigError
from shared.packing import PADDING, pack_rows
from shared.vlm.model import ImageTokens, VisionLanguageModel


class GrowingRows:
    """B rows of one model. Changed in place by `append…`; `select` makes new ones.

    hidden_BD: the last hidden state (after the final norm) of each row's last token. next_B: the position after it.
    """

    def __init__(
        self, model: VisionLanguageModel, cache: DynamicCache, visible_BS: Tensor, next_B: Tensor, hidden_BD: Tensor
    ):
        self.model = model
        self.next_B = next_B
        self.hidden_BD = hidden_BD
        self._cache = cache
        self._visible_BS = visible_BS

    @classmethod
    def after_images(cls, model: VisionLanguageModel, tokens: ImageTokens) -> GrowingRows:
        """Read the prompt up to the end of each row's images. Raises ConfigError with gradient checkpointing."""
        if model.decoder.training and getattr(model.decoder, "is_gradient_checkpointing", False):
            raise ConfigError(
                "generator.gradient_checkpointing: it switches off the key-value cache, which latents generated one "
                "after the other need; set it to false"
            )
        prompt, media = model.prompt, tokens.media
        rows = pack_rows(prompt.prefix_ids, media, [[]] * len(media), prompt.between_images_ids).to(model.device)
        cache = DynamicCache()
        hidden_BTD = model.decode(rows, torch.cat(tokens.tokens), tokens.deepstack, cache)
        visible_BT = rows.segments_BT != PADDING
        next_B = torch.where(visible_BT, rows.positions_3BT, -1).amax(dim=(0, 2)) + 1
        return cls(model, cache, visible_BT, next_B, _last(hidden_BTD, visible_BT))

    def __len__(self) -> int:
        return len(self.next_B)

    def append_tokens(self, token_ids: Sequence[Sequence[int]]) -> None:
        """One sequence of tokens for each row; lengths may differ, none may be empty."""
        assert all(len(ids) > 0 for ids in token_ids), "every row gets at least one token"
        n_columns = max(map(len, token_ids))
        padded = [[*ids, *[0] * (n_columns - len(ids))] for ids in token_ids]
        lengths_B = torch.tensor([len(ids) for ids in token_ids])
        present_BT = (torch.arange(n_columns) < lengths_B[:, None]).to(self.model.device)
        positions_BT = self.next_B[:, None] + torch.arange(n_columns, device=self.model.device)
        embeds_BTD = self.model.embed(torch.tensor(padded, device=self.model.device))
        self.append(embeds_BTD, positions_BT.expand(3, -1, -1), present_BT)

    def append(self, embeds_BTD: Tensor, positions_3BT: Tensor, present_BT: Tensor | None = None) -> None:
        """New columns in order. present_BT: False at padding, which stands after a row's own columns; None: nowhere."""
        n_rows, n_new, _ = embeds_BTD.shape
        if present_BT is None:
            present_BT = torch.ones(n_rows, n_new, dtype=torch.bool, device=embeds_BTD.device)
        causal_TT = torch.ones(n_new, n_new, dtype=torch.bool, device=embeds_BTD.device).tril()
        # Padding sees itself: a row without any key would turn into NaN.
        itself_TT = torch.eye(n_new, dtype=torch.bool, device=embeds_BTD.device)
        new_BTT = (causal_TT & present_BT[:, None, :]) | itself_TT
        old_BTS = self._visible_BS[:, None, :].expand(-1, n_new, -1)
        mask_B1TS = torch.cat([old_BTS, new_BTT], dim=2).unsqueeze(1)
        hidden_BTD = self.model.decode_embeddings(
            embeds_BTD.to(self.model.dtype), mask_B1TS, positions_3BT, past_key_values=self._cache
        )
        self._visible_BS = torch.cat([self._visible_BS, present_BT], dim=1)
        after_B = torch.where(present_BT, positions_3BT, -1).amax(dim=(0, 2)) + 1
        self.next_B = torch.maximum(self.next_B, after_B)
        self.hidden_BD = _last(hidden_BTD, present_BT)

    def select(self, rows: Sequence[int] | Tensor) -> GrowingRows:
        """New rows, each a continuation of the named old one: to branch (a row named twice) or to drop rows."""
        index = torch.as_tensor(rows, device=self.model.device)
        cache = DynamicCache()
        for i, layer in enumerate(self._cache.layers):
            cache.update(layer.keys[index], layer.values[index], i)
        return GrowingRows(self.model, cache, self._visible_BS[index], self.next_B[index], self.hidden_BD[index])

    @classmethod
    def joined(cls, parts: Sequence[GrowingRows]) -> GrowingRows:
        """The rows of several, in order, of whatever age. Columns that a row never sees again are closed up."""
        n_columns = max(int(part._visible_BS.sum(dim=1).max()) for part in parts)
        packed = [part._packed(n_columns) for part in parts]
        cache = DynamicCache()
        for i in range(len(parts[0]._cache.layers)):
            keys, values = zip(*(layers[i] for _, layers in packed), strict=True)
            cache.update(torch.cat(keys), torch.cat(values), i)
        visible_BS = torch.cat([visible for visible, _ in packed])
        next_B = torch.cat([part.next_B for part in parts])
        return cls(parts[0].model, cache, visible_BS, next_B, torch.cat([part.hidden_BD for part in parts]))

    def _packed(self, n_columns: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Visibility, and keys and values per layer, with each row's visible columns first, of `n_columns` in all."""
        # A stable sort keeps the order in which they were read.
        order_BS = (~self._visible_BS).int().argsort(dim=1, stable=True)[:, :n_columns]
        n_more = n_columns - order_BS.shape[1]
        layers = []
        for layer in self._cache.layers:
            index_BHSd = order_BS[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            keys, values = layer.keys.gather(2, index_BHSd), layer.values.gather(2, index_BHSd)
            layers.append((F.pad(keys, (0, 0, 0, n_more)), F.pad(values, (0, 0, 0, n_more))))
        return F.pad(self._visible_BS.gather(1, order_BS), (0, n_more)), layers


def _last(hidden_BTD: Tensor, present_BT: Tensor) -> Tensor:
    """(B, D) hidden state of each row's last column that is present."""
    columns_T = torch.arange(present_BT.shape[1], device=present_BT.device)
    last_B = torch.where(present_BT, columns_T, -1).amax(dim=1)
    return hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
