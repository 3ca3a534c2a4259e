"""A decoder's layers with the same numbers for less memory and work.

Legend: B rows, T queries, S keys, H heads, G key heads, d head width, D width, F feed-forward width, N places.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import SiLUActivation

ATTENTION = "sdpa_grouped"
"""Name under which transformers knows `grouped_attention`."""

_sdpa = AttentionInterface()["sdpa"]


def make_lean(decoder: Any) -> None:
    """Give a decoder's layers the products and the attention of this file, for good.

    Feed-forwards that are no SwiGLU (Shazeer 2020, arXiv 2002.05202) stay as they are.
    """
    decoder.set_attn_implementation(ATTENTION)
    for layer in decoder.layers:
        if isinstance(getattr(layer.mlp, "act_fn", None), nn.SiLU | SiLUActivation):
            layer.mlp.forward = functools.partial(_swiglu, layer.mlp)


@contextlib.contextmanager
def last_layer_at(decoder: Any, places_N2: Tensor) -> Iterator[None]:
    """While it lasts, what follows the last attention runs at N places (row, column) alone: it mixes no columns.

    Last hidden states elsewhere are then meaningless. Not while another thread uses the model.
    """
    last, at = decoder.layers[-1], places_N2.unbind(1)
    with contextlib.ExitStack() as stack:
        for module in (last.post_attention_layernorm, last.mlp, decoder.norm):
            stack.enter_context(_only_at(module, at))
        yield


@contextlib.contextmanager
def _only_at(module: Any, at: tuple[Tensor, ...]) -> Iterator[None]:
    whole = module.forward
    module.forward = lambda hidden_BTD: torch.zeros_like(hidden_BTD).index_put(at, whole(hidden_BTD[at]))
    try:
        yield
    finally:
        module.forward = whole


def grouped_attention(
    module: Any,
    query_BHTd: Tensor,
    key_BGSd: Tensor,
    value_BGSd: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> Any:
    """Attention by sdpa that repeats no keys and values where PyTorch's fused kernel can do without.

    That is the CPU's. The kernels for GPUs that take a mask want every head's own keys.
    """
    if attention_mask is None or query_BHTd.device.type != "cpu" or query_BHTd.shape[1] == key_BGSd.shape[1]:
        return _sdpa(module, query_BHTd, key_BGSd, value_BGSd, attention_mask, dropout=dropout, scaling=scaling, **rest)
    attended_BHTd = F.scaled_dot_product_attention(
        query_BHTd, key_BGSd, value_BGSd, attention_mask, dropout, scale=scaling, enable_gqa=True
    )
    return attended_BHTd.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, grouped_attention)
AttentionMaskInterface.register(ATTENTION, AttentionMaskInterface()["sdpa"])


def gated_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, elementwise, any shape. Backward needs the two factors alone."""
    product: Tensor = _GatedProduct.apply(gate, up)  # type: ignore[no-untyped-call]
    return product


def _swiglu(mlp: Any, hidden: Tensor) -> Tensor:
    output: Tensor = mlp.down_proj(gated_product(mlp.gate_proj(hidden), mlp.up_proj(hidden)))
    return output


class _GatedProduct(torch.autograd.Function):
    """Autograd would keep silu(gate) beside both factors; it is cheap to make again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, F.silu(gate).mul_(grad)
