"""EMA norm calibration: at inference, every latent gets the length of visual input embeddings; nothing is trained.

Hidden states that are fed back as inputs are much longer than the embeddings that a decoder knows as inputs. The
reference follows a statistic s of the norms of each record's visual embeddings as an exponential moving average

    r_t = Σ_i decay^(t−i) · s_i / Σ_i decay^(t−i),   i = 1 … t

record by record, so batches change nothing; divided by the sum of weights, so the first record weighs no more than its
share. A latent keeps its direction.

Legend: B records, K latents, D width, N visual embeddings of one record.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shared.config import NormCalibrationConfig
from shared.vlm import ImageTokens


class NormCalibration:
    """The running reference. Holds state between calls: one object for each pass over a data set."""

    def __init__(self, config: NormCalibrationConfig):
        self._config = config
        self.n_records = 0
        self._sum = 0.0
        self._weight = 0.0

    def observe(self, tokens: ImageTokens) -> Tensor:
        """(B,) float64 the norm for each record's latents, in order; NaN, which leaves them, while warming up."""
        norms = []
        for images in tokens.rows:
            norms_N = torch.cat(tokens.tokens[images]).detach().double().norm(dim=-1)
            statistic = float(norms_N.mean() if self._config.statistic == "mean" else norms_N.quantile(0.5))
            self._sum = self._config.decay * self._sum + statistic
            self._weight = self._config.decay * self._weight + 1.0
            self.n_records += 1
            is_warm = self.n_records > self._config.warmup_records
            norms.append(self._sum / self._weight if is_warm else torch.nan)
        return torch.tensor(norms, dtype=torch.float64, device=tokens.tokens[0].device)

    def __call__(self, latents_BKD: Tensor, tokens: ImageTokens) -> Tensor:
        """Latents of a batch rescaled by the norms of its images, which are taken in first."""
        return rescale(latents_BKD, self.observe(tokens))


def start_calibration(config: NormCalibrationConfig | None) -> NormCalibration | None:
    """A fresh calibration for one pass over a data set; None if it is switched off."""
    return None if config is None else NormCalibration(config)


def rescale(latents_BKD: Tensor, norms_B: Tensor | None) -> Tensor:
    """Latents (B, …, D) with the norm of their row and their own direction, in their own dtype; differentiable.

    Without norms nothing changes; rows whose norm is NaN, and latents of length zero, stay as they are. Computed in
    float64: the square of a large float32 number overflows.
    """
    if norms_B is None:
        return latents_BKD
    norms_BK1 = norms_B.double().reshape(-1, *[1] * (latents_BKD.ndim - 1))
    lengths_BK1 = latents_BKD.double().norm(dim=-1, keepdim=True)
    kept_BK1 = norms_BK1.isnan() | (lengths_BK1 == 0)
    factors_BK1 = torch.where(kept_BK1, 1.0, norms_BK1 / torch.where(kept_BK1, 1.0, lengths_BK1))
    return (latents_BKD.double() * factors_BK1).to(latents_BKD.dtype)
