"""Log-probabilities of answer tokens straight from hidden states, without ever holding all logits.

Legend: N answer tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 8192
"""Vocabulary rows at a time. On a CPU their logits stay in the cache; on a GPU twenty blocks are few enough."""


def token_logprobs(
    hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Each token's log p(target_n) (N,) and the most probable token (N,) under softmax(hidden · headᵀ + bias).

    The log-probabilities are float32 (float64 for float64 states), and differentiable with respect to the states.
    A head that itself trains takes the plain way, through the whole logits.
    """
    if head_VD.requires_grad and torch.is_grad_enabled():
        logits_NV = F.linear(hidden_ND, head_VD, bias_V)
        logits_NV = logits_NV.to(_accumulator(hidden_ND))
        return -F.cross_entropy(logits_NV, targets_N, reduction="none"), logits_NV.argmax(-1)
    logprobs_N, best_N = _FrozenHead.apply(hidden_ND, head_VD, bias_V, targets_N, block)  # type: ignore[no-untyped-call]
    return logprobs_N, best_N


class _FrozenHead(torch.autograd.Function):
    """Goes through the vocabulary once, block by block, with a running softmax.

    log p_n depends on state n alone, so ∂log p_n/∂h_n = W[target_n] − Σ_v p_nv · W[v] can be taken in forward for
    any later weighting of the tokens: backward scales N rows of width D. Maximum m, sum Σ exp(l − m) and the weighted
    sum of rows are rescaled whenever a block raises the maximum (Milakov & Gimelshein 2018, arXiv 1805.02867, alg. 3).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, block: int
    ) -> tuple[Tensor, Tensor]:
        dtype = _accumulator(hidden_ND)
        hidden_DN = hidden_ND.T.contiguous()
        maximum_N = torch.full_like(targets_N, -torch.inf, dtype=dtype)
        total_N, best_N = torch.zeros_like(maximum_N), torch.zeros_like(targets_N)
        rows_ND = torch.zeros_like(hidden_ND, dtype=dtype) if ctx.needs_input_grad[0] else None
        for start in range(0, len(head_VD), block):
            head_vD = head_VD[start : start + block]
            logits_vN = (head_vD @ hidden_DN).to(dtype)
            if bias_V is not None:
                logits_vN += bias_V[start : start + block, None]
            block_maximum_N, block_best_N = logits_vN.max(dim=0)
            best_N = torch.where(block_maximum_N > maximum_N, block_best_N + start, best_N)
            new_maximum_N = torch.maximum(maximum_N, block_maximum_N)
            shrink_N = (maximum_N - new_maximum_N).exp()
            weights_vN = logits_vN.sub_(new_maximum_N).exp_()
            total_N = total_N * shrink_N + weights_vN.sum(dim=0)
            if rows_ND is not None:
                rows_ND = rows_ND * shrink_N.unsqueeze(1) + weights_vN.T.to(head_vD.dtype) @ head_vD
            maximum_N = new_maximum_N

        target_rows_ND = head_VD[targets_N]
        # The product of two bfloat16 states is exact in float32, as inside a matrix product.
        target_logits_N = (hidden_ND.to(dtype) * target_rows_ND.to(dtype)).sum(dim=1)
        if bias_V is not None:
            target_logits_N += bias_V[targets_N]
        if rows_ND is not None:
            ctx.save_for_backward(target_rows_ND - rows_ND / total_N.unsqueeze(1))
            ctx.hidden_dtype = hidden_ND.dtype
        ctx.mark_non_differentiable(best_N)
        return target_logits_N - maximum_N - total_N.log(), best_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        (jacobian_ND,) = ctx.saved_tensors
        return (grad_N.unsqueeze(1) * jacobian_ND).to(ctx.hidden_dtype), None, None, None, None


def _accumulator(hidden_ND: Tensor) -> torch.dtype:
    return torch.float64 if hidden_ND.dtype is torch.float64 else torch.float32
