"""Attention weights of chosen queries, which sdpa does not give: only their rows are computed beside it.

Legend: B rows, H heads, T queries, S keys, n chosen queries, d head width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

_NAME = "sdpa_with_chosen_rows"
Queries = Callable[[Tensor], Tensor]
"""From anything of shape (B, ·, T, ·), what belongs to the chosen queries: (B, ·, n, ·)."""


def last_queries(n: int) -> Queries:
    """The last n columns of every row."""
    return lambda values: values[:, :, -n:]


def one_query(columns_B: Tensor) -> Queries:
    """One column of each row."""
    rows_B = torch.arange(len(columns_B), device=columns_B.device)
    return lambda values: values.expand(len(columns_B), -1, -1, -1)[rows_B, :, columns_B].unsqueeze(2)


@contextlib.contextmanager
def attention_of(decoder: Any, queries: Queries) -> Iterator[list[Tensor]]:
    """Collects, layer by layer, what chosen queries of a decoder attend to: (B, n, S), averaged over heads.

    Not while another thread uses the model: its attention function is switched while the context lasts.
    """
    layers: list[Tensor] = []
    before = decoder.config._attn_implementation
    plain = AttentionInterface()[before]

    def attend(
        module: Any,
        query_BHTd: Tensor,
        key: Tensor,
        value: Tensor,
        attention_bias: Tensor,
        *,
        scaling: float,
        **rest: Any,
    ) -> Any:
        key_BHSd = key.repeat_interleave(query_BHTd.shape[1] // key.shape[1], dim=1)
        scores_BHnS = scaling * queries(query_BHTd) @ key_BHSd.mT + queries(attention_bias)
        layers.append(scores_BHnS.float().softmax(dim=-1).mean(dim=1))
        return plain(module, query_BHTd, key, value, attention_bias, scaling=scaling, **rest)

    AttentionInterface.register(_NAME, attend)
    decoder.set_attn_implementation(_NAME)
    try:
        yield layers
    finally:
        decoder.set_attn_implementation(before)
