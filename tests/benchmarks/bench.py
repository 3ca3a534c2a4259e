"""What every row of the anchor path's benchmark needs: sizes, device, repetitions, models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anchor_service.frozen_anchor import FrozenAnchor, load_frozen_anchor
from shared.config import AnchorConfig
from shared.messages import Gradient, LatentPositions, ReadRequest
from tests.benchmarks.models import TINY, ModelSize, build_folder, make_questions

N_IMAGES, N_LATENTS, N_QUESTIONS = 4, 16, 3


@dataclass(frozen=True, slots=True)
class Bench:
    """One run of a benchmark.

    command: what a user typed, for RESULTS.md. tiny: every model is TINY, to try the code out; figures mean nothing.
    with_weights: models are read from files; otherwise `models.random_weights` makes them on the device.
    """

    root: Path
    command: str
    repetitions: int
    device: str = "cpu"
    dtype: str = "float32"
    tiny: bool = False
    with_weights: bool = True

    def folder(self, size: ModelSize, seed: int = 0) -> Path:
        """A model folder, written when it is first asked for."""
        size = TINY if self.tiny else size
        folder = self.root / f"model-{size.width}-{size.vocabulary}-{seed}"
        if not folder.is_dir():
            build_folder(size, folder, seed=seed, with_weights=self.with_weights)
        return folder

    def anchor_fields(self, name: str, size: ModelSize, seed: int = 0) -> dict[str, object]:
        """One entry of a config's anchors."""
        gpus = 1 if self.device == "cuda" else 0
        return {"name": name, "model": str(self.folder(size, seed)), "dtype": self.dtype, "gpus": gpus}

    def anchor(self, size: ModelSize) -> FrozenAnchor:
        """A frozen anchor in this process."""
        config = AnchorConfig.model_validate({**self.anchor_fields("anchor", size), "placement": "local"})
        return load_frozen_anchor(config, N_LATENTS, LatentPositions.TEXT, self.device)


def read_request(
    anchor: FrozenAnchor, n_questions: int = N_QUESTIONS, n_images: int = N_IMAGES, n_latents: int = N_LATENTS
) -> ReadRequest:
    """Random latents of the length of words, with questions; the gradient is asked for."""
    model = anchor.model
    scale = float(model.embed(torch.arange(16, device=model.device)).float().std())
    return ReadRequest(
        "benchmark",
        make_questions(n_images, n_questions),
        random_latents(n_images, n_latents, model.width, model.dtype).to(model.device) * scale,
        Gradient.FUSED,
    )


def random_latents(n_images: int, n_latents: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Reproducible noise (B, K, D)."""
    return torch.randn(n_images, n_latents, width, generator=torch.Generator().manual_seed(0)).to(dtype)
