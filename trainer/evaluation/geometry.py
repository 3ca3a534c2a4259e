"""Geometry of latents: how they lie, never alone a proof that they are used.

Figures of single images come per image, so that a caller can resample images. Everything is computed in float64.

Legend: B images, K latents (slots), D width, N rows of a feature matrix or visual tokens, P features.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HELPFUL_NATS = 0.05


def slot_cosine(latents_BKD: Tensor) -> Tensor:
    """(B,) mean off-diagonal cosine within each example: Σ_{k≠l} cos(h_k, h_l) / (K (K − 1)); NaN for K = 1.

    1: all slots point the same way. 0: they are orthogonal on average.
    """
    units_BKD = F.normalize(latents_BKD.double(), dim=-1)
    cosines_BKK = units_BKD @ units_BKD.mT
    n = units_BKD.shape[1]
    off_diagonal_KK = 1 - torch.eye(n, dtype=torch.float64, device=units_BKD.device)
    return (cosines_BKK * off_diagonal_KK).sum(dim=(1, 2)) / (n * (n - 1))


def between_image_cosine(latents_BKD: Tensor) -> Tensor:
    """(B, K) values whose mean over images is each slot's mean cosine over all pairs of different images.

    With c_b = Σ_{a≠b} cos(h_a, h_b) / (B − 1) and c their mean, the values are 2 c_b − c: the jackknife's
    pseudo-values, to first order. A mean over pairs counts every image twice, so resampling the c_b themselves would
    give an interval of half the width (Arvesen 1969, jackknifing U-statistics). Needs B ≥ 2.
    """
    units_BKD = F.normalize(latents_BKD.double(), dim=-1)
    others_BKD = units_BKD.sum(dim=0, keepdim=True) - units_BKD
    mean_cosine_BK = (units_BKD * others_BKD).sum(dim=-1) / (len(units_BKD) - 1)
    return 2 * mean_cosine_BK - mean_cosine_BK.mean(dim=0)


def effective_rank(latents_BKD: Tensor) -> Tensor:
    """(B,) exp(−Σ p_i log p_i), p_i = σ_i / Σ σ, with the singular values σ of each example's K×D matrix as it is.

    From 1 (all latents parallel) to min(K, D) (orthogonal, of one length). NaN for latents that are all zero.
    Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    sigma_BK = torch.linalg.svdvals(latents_BKD.double())
    p_BK = sigma_BK / sigma_BK.sum(dim=-1, keepdim=True)
    return torch.special.entr(p_BK).sum(dim=-1).exp()


def relative_norm(latents_BKD: Tensor, visual_ND: Tensor) -> Tensor:
    """(B, K) ‖h_k‖ over the mean norm of visual embeddings."""
    return latents_BKD.double().norm(dim=-1) / visual_ND.double().norm(dim=-1).mean()


def visual_cosine(latents_BKD: Tensor, pooled_BKD: Tensor) -> Tensor:
    """(B, K) cos(h_k, v_k) with the image's own visual embeddings pooled to K (`pooled_image_tokens`)."""
    return F.cosine_similarity(latents_BKD.double(), pooled_BKD.double(), dim=-1)


def utility(nll_N: np.ndarray, nll_zero_all_N: np.ndarray) -> np.ndarray:
    """(N,) NLL(zero_all) − NLL in nats, question by question: what the latents' content is worth to an anchor."""
    return nll_zero_all_N - nll_N


def helpful_slots(nll_keep_one_KN: np.ndarray, nll_zero_all_N: np.ndarray) -> int:
    """Slots that alone are worth HELPFUL_NATS or more: mean over questions of NLL(zero_all) − NLL(keep_one_k)."""
    gains_K = (nll_zero_all_N - nll_keep_one_KN).mean(axis=1)
    return int((gains_K >= HELPFUL_NATS).sum())


def linear_cka(features_NP: Tensor, other_NQ: Tensor) -> float:
    """‖Yᵀ X‖²_F / (‖Xᵀ X‖_F ‖Yᵀ Y‖_F) of two column-centred sets of features of the same N images.

    1 where one is the other rotated and scaled. Computed as ⟨X Xᵀ, Y Yᵀ⟩ of the N×N Gram matrices, which is the same.
    Biased upwards where features outnumber images: compare values of one N only. NaN for constant features.
    Kornblith et al. 2019, "Similarity of neural network representations revisited" (CKA with linear kernels).
    """
    gram_NN, other_gram_NN = _centred_gram(features_NP), _centred_gram(other_NQ)
    return float((gram_NN * other_gram_NN).sum() / (gram_NN.norm() * other_gram_NN.norm()))


def _centred_gram(features_NP: Tensor) -> Tensor:
    features_NP = features_NP.double()
    centred_NP = features_NP - features_NP.mean(dim=0)
    if centred_NP.norm() < 1e-12 * features_NP.norm():
        centred_NP = torch.zeros_like(centred_NP)  # what is left of constant features is rounding
    return centred_NP @ centred_NP.T
