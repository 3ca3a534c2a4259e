"""PCA of visual input embeddings, streamed: memory is bounded by one D×D matrix however many images there are.

The subspace that it finds is where a frozen model's own image tokens lie; a head that predicts coefficients in it
(`trainer.gap.heads.PcaHead`) cannot leave it.

Legend: N vectors, D width, d components.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shared.errors import DataError, ModelError

_TENSORS = ("mean_D", "basis_Dd", "explained_variance_d", "total_variance", "n_vectors")


@dataclass(frozen=True, slots=True)
class VisualPca:
    """A mean and d orthonormal directions of D-wide vectors, float64.

    basis_Dd: columns in order of falling variance, the largest entry of each positive. explained_variance_d: along
    each. total_variance: of all D directions. n_vectors: how many vectors it was fitted on.
    """

    mean_D: Tensor
    basis_Dd: Tensor
    explained_variance_d: Tensor
    total_variance: float
    n_vectors: int

    @property
    def width(self) -> int:
        """D."""
        return len(self.mean_D)

    @property
    def n_components(self) -> int:
        """How many directions are kept (d)."""
        return self.basis_Dd.shape[1]

    @property
    def explained_share(self) -> float:
        """Share of the total variance that the kept directions explain."""
        return float(self.explained_variance_d.sum()) / self.total_variance

    def coefficients(self, vectors_ND: Tensor) -> Tensor:
        """Pᵀ (v − μ), (…, D) → (…, d), float64."""
        return (vectors_ND.double() - self.mean_D.to(vectors_ND.device)) @ self.basis_Dd.to(vectors_ND.device)

    def project(self, vectors_ND: Tensor) -> Tensor:
        """P Pᵀ (v − μ) + μ: the nearest vectors of the affine subspace, (…, D), float64."""
        return self.coefficients(vectors_ND) @ self.basis_Dd.T.to(vectors_ND.device) + self.mean_D.to(vectors_ND.device)

    def save(self, file: Path) -> None:
        """Write one safetensors file."""
        scalars = {
            "total_variance": torch.tensor(self.total_variance, dtype=torch.float64),
            "n_vectors": torch.tensor(self.n_vectors),
        }
        tensors = {name: getattr(self, name).cpu().contiguous() for name in _TENSORS if name not in scalars}
        save_file({**tensors, **scalars}, file)


def load_pca(file: Path, width: int | None = None) -> VisualPca:
    """Read what `VisualPca.save` wrote. Raises ModelError if it is damaged or not of `width`."""
    try:
        with safe_open(file, framework="pt") as tensors:
            mean_D, basis_Dd, variance_d, total, n_vectors = (tensors.get_tensor(name) for name in _TENSORS)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file}: no PCA of visual embeddings ({' '.join(str(error).split())}); fit one: python -m trainer pca"
        ) from error
    if basis_Dd.ndim != 2 or basis_Dd.shape != (len(mean_D), len(variance_d)):
        raise ModelError(f"{file}: mean, basis and variances do not fit each other; fit the PCA again")
    if width is not None and len(mean_D) != width:
        raise ModelError(f"{file}: the PCA is of width {len(mean_D)}, the model of {width}; fit one with this model")
    return VisualPca(mean_D, basis_Dd, variance_d, float(total), int(n_vectors))


class IncrementalPca:
    """Running mean and scatter matrix in float64, on the device of the first batch.

    Batches are merged by the pairwise update of Chan, Golub & LeVeque (1983, "Algorithms for computing the sample
    variance"), each around its own mean, so no difference of large sums is ever taken. Their order changes nothing but
    the last bits.
    """

    def __init__(self, width: int):
        self.width = width
        self.n_vectors = 0
        self._mean_D = torch.zeros(width, dtype=torch.float64)
        self._scatter_DD = torch.zeros(width, width, dtype=torch.float64)

    def update(self, vectors_ND: Tensor) -> None:
        """Take in a batch. Raises DataError for vectors that are not finite."""
        if vectors_ND.ndim != 2 or vectors_ND.shape[1] != self.width:
            raise ValueError(f"vectors of shape {tuple(vectors_ND.shape)} for a PCA of width {self.width}")
        if len(vectors_ND) == 0:
            return
        if not torch.isfinite(vectors_ND).all():
            raise DataError("a visual embedding is NaN or infinite; use dtype float32, or remove the image")
        vectors_ND = vectors_ND.detach().double()
        self._mean_D, self._scatter_DD = self._mean_D.to(vectors_ND.device), self._scatter_DD.to(vectors_ND.device)
        n, n_new = self.n_vectors, len(vectors_ND)
        new_mean_D = vectors_ND.mean(dim=0)
        centred_ND = vectors_ND - new_mean_D
        shift_D = new_mean_D - self._mean_D
        self._scatter_DD += centred_ND.T @ centred_ND + torch.outer(shift_D, shift_D) * (n * n_new / (n + n_new))
        self._mean_D = self._mean_D + shift_D * (n_new / (n + n_new))
        self.n_vectors = n + n_new

    def fit(self, variance: float = 0.95, n_components: int | None = None) -> VisualPca:
        """The first `n_components` directions, or else as many as explain more than `variance` of all.

        Raises DataError if the vectors seen do not span that many.
        """
        if not 0 < variance < 1:
            raise ValueError(f"variance must lie between 0 and 1, got {variance}")
        variances_D, basis_DD = torch.linalg.eigh(self._scatter_DD / max(1, self.n_vectors - 1))
        variances_D, basis_DD = variances_D.flip(0).clamp(min=0), basis_DD.flip(1)
        total = float(variances_D.sum())
        rounding = self.width * torch.finfo(torch.float64).eps * float(variances_D[0])
        rank = int((variances_D > rounding).sum())
        if n_components is None:
            shares_D = variances_D.cumsum(0) / max(total, torch.finfo(torch.float64).tiny)
            n_components = int((shares_D <= variance).sum()) + 1
        if not 1 <= n_components <= rank:
            raise DataError(
                f"{self.n_vectors} visual embeddings span {rank} directions, {n_components} components are asked for; "
                "use more images or fewer components"
            )
        basis_Dd = basis_DD[:, :n_components]
        signs_d = basis_Dd.gather(0, basis_Dd.abs().argmax(dim=0, keepdim=True)).sign()
        return VisualPca(self._mean_D.clone(), basis_Dd * signs_d, variances_D[:n_components], total, self.n_vectors)
