"""Closed-form reader projectors: from the generator's space into that of an anchor of another family or width.

Fitted on pairs: latents, or pooled visual embeddings, of training images and the reader's own visual embeddings of
the same images, pooled to the same regions. No gradient, no answer, no test image goes in. Computed in float64.

Legend: N pairs (images × K, flattened), D the generator's width, E the reader's width, B images, K latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ReaderProjector:
    """x ↦ x W + b."""

    weight_DE: Tensor
    bias_E: Tensor

    def __call__(self, latents_BKD: Tensor) -> Tensor:
        """(B, K, D) → (B, K, E), in the latents' dtype."""
        projected_BKE = latents_BKD.to(self.weight_DE) @ self.weight_DE + self.bias_E
        return projected_BKE.to(latents_BKD.dtype)


def fit_least_squares(source_ND: Tensor, target_NE: Tensor) -> ReaderProjector:
    """The W and b that minimise Σ ‖x W + b − y‖², without ridge; of several, the W of least norm.

    The bias lets the two models' embeddings have different means. Directions in which the source does not vary are
    mapped to nothing: `share_outside_span` says how much of given latents lies there.
    """
    source_mean_D, centred_ND, target_mean_E, centred_target_NE = _centred_pairs(source_ND, target_NE)
    # gelsd, because it alone takes sources without full rank.
    weight_DE = torch.linalg.lstsq(centred_ND, centred_target_NE, driver="gelsd").solution
    return ReaderProjector(weight_DE, target_mean_E - source_mean_D @ weight_DE)


def fit_procrustes(source_ND: Tensor, target_NE: Tensor) -> ReaderProjector:
    """A rotation (or reflection) with one scale and a shift: x ↦ s (x − x̄) R + ȳ, so that all angles are kept.

    R = U Vᵀ from the thin SVD of X̃ᵀ Ỹ = U Σ Vᵀ of the centred pairs (Schönemann 1966), s = tr Σ / ‖X̃ R‖²; the scale
    because families differ in the length of their embeddings. Where D ≤ E, R Rᵀ = 1 and this is the least-squares
    solution among such maps. Where D > E, Rᵀ R = 1: R drops D − E directions, angles are kept in the rest, and R
    maximises tr(Rᵀ X̃ᵀ Ỹ), since the least-squares solution has no closed form.
    """
    source_mean_D, centred_ND, target_mean_E, centred_target_NE = _centred_pairs(source_ND, target_NE)
    left, sigma, right = torch.linalg.svd(centred_ND.T @ centred_target_NE, full_matrices=False)
    rotation_DE = left @ right
    weight_DE = sigma.sum() / (centred_ND @ rotation_DE).square().sum() * rotation_DE
    return ReaderProjector(weight_DE, target_mean_E - source_mean_D @ weight_DE)


def share_outside_span(latents_ND: Tensor, source_ND: Tensor, held_variance: float = 1.0) -> float:
    """Share of the latents' variance that lies outside the span of the centred source a projector was fitted on.

    ‖H̃ − H̃ V Vᵀ‖² / ‖H̃‖², H̃ the latents less their own mean, V the source's principal directions, largest first,
    until they hold `held_variance` of its variance. With 1.0, V is the whole span, which is everything as soon as
    the source outnumbers D with some noise in it; 0.99 asks for the directions that the fit had evidence for.
    """
    _, sigma_R, directions_RD = torch.linalg.svd(_centred(source_ND)[1], full_matrices=False)
    spanned = sigma_R > sigma_R[0] * max(source_ND.shape) * torch.finfo(torch.float64).eps
    held_R = sigma_R.square().cumsum(0) / sigma_R.square().sum()
    needed = torch.cat([torch.ones(1, dtype=torch.bool), held_R[:-1] < held_variance])
    basis_RD = directions_RD[spanned & needed]
    centred_ND = _centred(latents_ND)[1]
    outside_ND = centred_ND - centred_ND @ basis_RD.T @ basis_RD
    return float(outside_ND.square().sum() / centred_ND.square().sum())


def _centred_pairs(source_ND: Tensor, target_NE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert len(source_ND) == len(target_NE), "one target for each source"
    return (*_centred(source_ND), *_centred(target_NE))


def _centred(values_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and centred values, float64 on the CPU, where `gelsd` is."""
    values_ND = values_ND.detach().to("cpu", torch.float64)
    mean_D = values_ND.mean(dim=0)
    return mean_D, values_ND - mean_D
