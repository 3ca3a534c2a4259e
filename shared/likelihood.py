"""Log-probabilities of answer tokens straight from hidden states, without ever holding all logits.

Legend: N answer tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 256 * 2**20
"""Most bytes of float32 logits at a time."""


def token_logprobs(
    hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """Each token's log p(target_n) (N,) and the most probable token (N,) under softmax(hidden · headᵀ + bias).

    The log-probabilities are float32 (float64 for float64 states), and differentiable with respect to the states.
    A head that itself trains takes the plain way, through the whole logits.
    """
    if head_VD.requires_grad and torch.is_grad_enabled():
        logits_NV = _logits(hidden_ND, head_VD, bias_V)
        return -F.cross_entropy(logits_NV, targets_N, reduction="none"), logits_NV.argmax(-1)
    rows = max(1, chunk_bytes // (4 * len(head_VD)))
    logprobs_N, best_N = _FrozenHead.apply(hidden_ND, head_VD, bias_V, targets_N, rows)  # type: ignore[no-untyped-call]
    return logprobs_N, best_N


class _FrozenHead(torch.autograd.Function):
    """Makes each chunk's logits once and keeps of them what backward needs.

    log p_n depends on state n alone, so ∂log p_n/∂h_n = W[target_n] − Σ_v p_nv · W[v] can be taken in forward for
    any later weighting of the tokens: backward scales N rows of width D.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        wants_gradient = ctx.needs_input_grad[0]
        logprobs, best, jacobians = [], [], []
        for hidden_nD, targets_n in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True):
            logits_nV = _logits(hidden_nD, head_VD, bias_V)
            best.append(logits_nV.argmax(-1))
            logprobs_nV = logits_nV - logits_nV.logsumexp(-1, keepdim=True)
            logprobs.append(logprobs_nV.gather(1, targets_n.unsqueeze(1)).squeeze(1))
            if wants_gradient:
                minus_gradient_nV = logprobs_nV.exp_()
                minus_gradient_nV.scatter_add_(
                    1, targets_n.unsqueeze(1), minus_gradient_nV.new_full((len(targets_n), 1), -1.0)
                )
                jacobians.append(-(minus_gradient_nV.to(head_VD.dtype) @ head_VD))
        if wants_gradient:
            ctx.save_for_backward(torch.cat(jacobians))
        best_N = torch.cat(best)
        ctx.mark_non_differentiable(best_N)
        return torch.cat(logprobs), best_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        (jacobian_ND,) = ctx.saved_tensors
        return (grad_N.unsqueeze(1) * jacobian_ND).to(jacobian_ND.dtype), None, None, None, None


def _logits(hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    logits_NV = F.linear(hidden_ND, head_VD, bias_V)
    return logits_NV if logits_NV.dtype is torch.float64 else logits_NV.float()
