"""The loss terms of the methods as pure functions, and their schedules.

Legend: B images, R anchors, K latents, D width, d PCA coefficients.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


def nll_multi(nll_RB: Tensor, weights_R: Tensor) -> Tensor:
    """Σ_r w_r · mean_b NLL_rb / Σ_r w_r, a scalar in nats."""
    return (weights_R * nll_RB.mean(dim=1)).sum() / weights_R.sum()


def concept_loss(predicted_BKD: Tensor, target_BKD: Tensor) -> Tensor:
    """mean(1 − cos(predicted_k, target_k)) over images and latents, computed in float32."""
    return (1.0 - F.cosine_similarity(predicted_BKD.float(), target_BKD.float(), dim=-1)).mean()


def norm_loss(latents_BKD: Tensor, target_norm: float | Tensor) -> Tensor:
    """mean(((‖h_k‖ − μ) / μ)²), computed in float32; relative, so that its size does not depend on the model.

    target_norm: μ, or one for each image (B, 1).
    """
    norms_BK = latents_BKD.float().norm(dim=-1)
    return (((norms_BK - target_norm) / target_norm) ** 2).mean()


def coefficient_loss(predicted_BKd: Tensor, target_BKd: Tensor, variance: float) -> Tensor:
    """Mean over latents of ‖ĉ_k − c_k‖² / variance, computed in float32.

    variance: of the coefficients in all (`VisualPca.explained_variance_d` summed), so that always predicting the mean
    of visual embeddings gives about 1 for every model.
    """
    squared_BK = (predicted_BKd.float() - target_BKd.float()).square().sum(dim=-1)
    return squared_BK.mean() / variance


def half_cosine(step: int, n_steps: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at step n_steps and after, along half a cosine."""
    if step >= n_steps:
        return end
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * step / n_steps))


def lr_share(step: int, n_steps: int, warmup_steps: int, final_share: float) -> float:
    """Share of a group's own learning rate: linear warm-up, then a cosine to `final_share`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return half_cosine(step - warmup_steps, max(1, n_steps - warmup_steps), 1.0, final_share)


class ConceptHead(nn.Module):
    """MLP D → D/2 → D with GELU, from latents to pooled visual tokens; thrown away after training."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width))

    def forward(self, latents_BKD: Tensor) -> Tensor:
        """(B, K, D) → (B, K, D), float32."""
        predicted: Tensor = self.layers(latents_BKD.float())
        return predicted
