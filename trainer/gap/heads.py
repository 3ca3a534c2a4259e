"""Latent heads: from the hidden state before a latent to the embedding that is fed back as the next input.

    identity   the hidden state itself ("output as input")
    mlp        D → D → D with GELU, full width
    pca        c = F h̄ + b of d coefficients, latent = P c + μ: always in the subspace of visual input embeddings

Legend: D width, d PCA coefficients, leading dimensions are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import CheckpointError, ModelError
from trainer.gap.pca import VisualPca

HeadKind = Literal["identity", "mlp", "pca"]


class IdentityHead(nn.Module):
    """The hidden state as it is."""

    def forward(self, hidden_BD: Tensor) -> Tensor:
        """(…, D) → (…, D)."""
        return hidden_BD


class MlpHead(nn.Module):
    """Full width: Linear, GELU, Linear; computes in the dtype of its weights."""

    def __init__(self, width: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden_BD: Tensor) -> Tensor:
        """(…, D) → (…, D)."""
        latent_BD: Tensor = self.outer(F.gelu(self.inner(hidden_BD.to(self.inner.weight.dtype))))
        return latent_BD


class PcaHead(nn.Module):
    """D × d weights instead of D × D. The basis is saved with the weights but never trained."""

    mean_D: Tensor
    basis_Dd: Tensor

    def __init__(self, pca: VisualPca):
        super().__init__()
        self.linear = nn.Linear(pca.width, pca.n_components)
        self.register_buffer("mean_D", pca.mean_D.float())
        self.register_buffer("basis_Dd", pca.basis_Dd.float())
        self.variance = float(pca.explained_variance_d.sum())
        """Of all coefficients of visual embeddings together, the unit of `coefficient_loss`."""

    def coefficients(self, hidden_BD: Tensor) -> Tensor:
        """c, (…, D) → (…, d): what `coefficient_loss` compares."""
        c_Bd: Tensor = self.linear(hidden_BD.to(self.linear.weight.dtype))
        return c_Bd

    def target(self, vectors_BD: Tensor) -> Tensor:
        """Pᵀ (v − μ) of target embeddings, (…, D) → (…, d), without a graph."""
        with torch.no_grad():
            return (vectors_BD.to(self.mean_D.dtype) - self.mean_D) @ self.basis_Dd

    def forward(self, hidden_BD: Tensor) -> Tensor:
        """P c + μ, (…, D) → (…, D)."""
        return self.coefficients(hidden_BD) @ self.basis_Dd.T + self.mean_D


def head_of_state(kind: HeadKind, width: int, state: Mapping[str, Tensor]) -> nn.Module:
    """The head with the weights that its `state_dict` held; a PCA head brings its basis with it.

    Raises CheckpointError if they are of another kind or width.
    """
    pca = None
    if kind == "pca" and "basis_Dd" in state:
        basis_Dd = state["basis_Dd"]
        pca = VisualPca(state["mean_D"], basis_Dd, torch.ones(basis_Dd.shape[1]), float(basis_Dd.shape[1]), 0)
    try:
        head = make_head(kind, width, pca)
        head.load_state_dict(dict(state))
    except (ModelError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint's latent head is no {kind} head of width {width}; correct it") from error
    return head.eval()


def make_head(kind: HeadKind, width: int, pca: VisualPca | None = None) -> nn.Module:
    """A head of a kind for a model of `width`; pca needs a fitted PCA of that width. Raises ModelError."""
    if kind == "pca":
        if pca is None or pca.width != width:
            found = "none is given" if pca is None else f"this one has width {pca.width}"
            raise ModelError(f"latent head pca needs a PCA of width {width}, {found}; fit one: python -m trainer pca")
        return PcaHead(pca)
    return MlpHead(width) if kind == "mlp" else IdentityHead()
