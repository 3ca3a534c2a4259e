"""Figures with intervals. The unit of resampling is the image: questions about one image are not independent.

Legend: B images, N questions of all images together, S resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.special import stdtrit


@dataclass(frozen=True, slots=True)
class Figure:
    """A value with its 95 % interval; n counts questions, or runs in a summary over seeds."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | None]:
        """Plain values; null where a figure is undefined (a share of nothing), which JSON has no number for."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


class ImageBootstrap:
    """The same resamples of B images for every figure, so that differences and shares are paired.

    Deterministic in (n_images, n_samples, seed).
    """

    def __init__(self, n_images: int, n_samples: int, seed: int):
        rng = np.random.default_rng(seed)
        # How often each resample draws each image: (S, B). As floats, or every product would convert them first.
        self._draws_SB = np.stack(
            [np.bincount(rng.integers(0, n_images, n_images), minlength=n_images) for _ in range(n_samples)]
        ).astype(np.float64)

    def per_image(self, images_N: np.ndarray, values_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(sums, counts) per image of values that belong to the images `images_N` (0 … B−1)."""
        n_images = self._draws_SB.shape[1]
        sums_B = np.bincount(images_N, weights=values_N, minlength=n_images)
        return sums_B, np.bincount(images_N, minlength=n_images).astype(float)

    def mean(self, sums_B: np.ndarray, counts_B: np.ndarray) -> Figure:
        """Mean over questions, given each image's sum and number of questions."""
        return self.ratio(lambda m: m[0], [(sums_B, counts_B)])

    def ratio(
        self, combine: Callable[[list[np.ndarray]], np.ndarray], parts: list[tuple[np.ndarray, np.ndarray]]
    ) -> Figure:
        """A function of several means, each given as (sums per image, counts per image), resampled together."""
        with np.errstate(divide="ignore", invalid="ignore"):
            means_S = [(self._draws_SB @ sums) / (self._draws_SB @ counts) for sums, counts in parts]
            samples_S = combine(means_S)
            value = combine([np.asarray(sums.sum() / counts.sum()) for sums, counts in parts])
        finite_S = samples_S[np.isfinite(samples_S)]
        low, high = np.percentile(finite_S, [2.5, 97.5]) if len(finite_S) else (np.nan, np.nan)
        return Figure(float(value), float(low), float(high), int(parts[0][1].sum()))


def recovered_share(means: list[np.ndarray]) -> np.ndarray:
    """(latents − floor) / (ceiling − floor) of the means [latents, floor, ceiling]."""
    latents, floor, ceiling = means
    return np.asarray((latents - floor) / (ceiling - floor))


def over_seeds(values: Sequence[float]) -> Figure:
    """Mean of one figure over runs that differ in their seed, with Student's interval; n counts runs.

    mean ± t(0.975, n − 1) · s / √n with s² = Σ (v − mean)² / (n − 1). One run has no interval (NaN).
    """
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return Figure(mean, math.nan, math.nan, n)
    half = float(stdtrit(n - 1, 0.975)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Figure(mean, mean - half, mean + half, n)
