"""Causal tests: the content of the latents is swapped, everything else stays.

A swap is a pure function from latents (B, K, D) to latents (B, K', D) of the same dtype and device. K' = K unless
the swap takes positions away: `truncate` leaves the first k, `drop_all` none. Swaps with chance in them take a seed.
They are meant for all images of a split at once, so that the numbers do not depend on the batch size of reading.

Legend: B images, K latents (slots), D width, N visual tokens of all images together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from shared.errors import DataError
from trainer.data.sampling import derangement

NOISE_LEVELS = (0.1, 0.3, 1.0)


@dataclass(frozen=True, slots=True)
class CausalTest:
    """What an anchor reads in place of the latents; without markers, the row holds no trace of an image."""

    swap: Callable[[Tensor], Tensor]
    keeps_markers: bool = True


def causal_tests(n_latents: int, visual_ND: Tensor, pooled_BKD: Tensor, seed: int) -> dict[str, CausalTest]:
    """Every test by name, for latents of the images that `pooled_BKD` was pooled from.

    visual_ND: visual embeddings of many images, as the generator's language model reads them.
    pooled_BKD: those of each image, pooled to K (`shared.vlm.pooled_image_tokens`).
    Lengths of `truncate` are the powers of two below K. A single slot has no derangement, so K = 1 leaves
    permute_slots out.
    """
    swaps: dict[str, Callable[[Tensor], Tensor]] = {
        "zero_all": zero_all,
        "random_same_dist": partial(random_same_dist, seed=seed),
        "random_model_dist": partial(random_model_dist, visual_ND=visual_ND, seed=seed),
        "first_repeat": first_repeat,
        "swap_images": partial(swap_images, seed=seed),
        "oracle": partial(oracle, pooled_BKD=pooled_BKD),
        "markers_only": drop_all,
    }
    if n_latents > 1:
        swaps["permute_slots"] = partial(permute_slots, seed=seed)
    swaps |= {f"noise_{sigma:g}": partial(add_noise, sigma=sigma, seed=seed) for sigma in NOISE_LEVELS}
    swaps |= {f"zero_slot_{k}": partial(zero_slot, slot=k) for k in range(n_latents)}
    swaps |= {f"keep_one_{k}": partial(keep_one, slot=k) for k in range(n_latents)}
    lengths = [2**i for i in range((n_latents - 1).bit_length())]
    swaps |= {f"truncate_{k}": partial(truncate, length=k) for k in lengths}
    tests = {name: CausalTest(swap) for name, swap in swaps.items()}
    return tests | {"removed": CausalTest(drop_all, keeps_markers=False)}


def zero_slot(latents_BKD: Tensor, slot: int) -> Tensor:
    """One slot set to zero. Keeps every other slot."""
    zeroed_BKD = latents_BKD.clone()
    zeroed_BKD[:, slot] = 0
    return zeroed_BKD


def zero_all(latents_BKD: Tensor) -> Tensor:
    """All slots set to zero. Keeps the number of positions."""
    return torch.zeros_like(latents_BKD)


def keep_one(latents_BKD: Tensor, slot: int) -> Tensor:
    """One slot alone: the others are zero. Keeps the slot in its place.

    So it differs from `zero_all` in this slot only, and the difference of their NLL is what the slot gives alone.
    """
    kept_BKD = torch.zeros_like(latents_BKD)
    kept_BKD[:, slot] = latents_BKD[:, slot]
    return kept_BKD


def random_same_dist(latents_BKD: Tensor, seed: int) -> Tensor:
    """Gaussian with the latents' mean and standard deviation in each dimension, over images and slots.

    Keeps these two up to sampling error; loses what belongs to an image, to a slot, or to a pair of dimensions.
    """
    return _gaussian_like(latents_BKD, latents_BKD.flatten(0, 1), seed)


def random_model_dist(latents_BKD: Tensor, visual_ND: Tensor, seed: int) -> Tensor:
    """Gaussian with the visual embeddings' mean and standard deviation in each dimension.

    Keeps nothing of the latents but their number.
    """
    return _gaussian_like(latents_BKD, visual_ND, seed)


def first_repeat(latents_BKD: Tensor) -> Tensor:
    """Slot 0 in every slot. Keeps the image's own vector of that slot, and its length."""
    return latents_BKD[:, :1].expand_as(latents_BKD).contiguous()


def permute_slots(latents_BKD: Tensor, seed: int) -> Tensor:
    """No slot stays in its place; all images get the same order. Keeps each image's set of vectors (K ≥ 2)."""
    return latents_BKD[:, torch.from_numpy(derangement(latents_BKD.shape[1], seed))]


def swap_images(latents_BKD: Tensor, seed: int) -> Tensor:
    """The latents of another image, whole. Keeps the slots' order, and the set of images.

    Raises DataError for a single image.
    """
    if len(latents_BKD) < 2:
        raise DataError("swap_images: the split has a single image; evaluate on two or more")
    return latents_BKD[torch.from_numpy(derangement(len(latents_BKD), seed))]


def add_noise(latents_BKD: Tensor, sigma: float, seed: int) -> Tensor:
    """Latents with noise: h + σ · rms(h) · ε, ε ~ N(0, 1), rms(h) = ‖h‖/√D of each vector.

    Gives every vector the same ratio of signal to noise, 1/σ. The same ε for every σ.
    """
    rms_BK1 = latents_BKD.float().square().mean(dim=-1, keepdim=True).sqrt()
    return (latents_BKD.float() + sigma * rms_BK1 * _normal_like(latents_BKD, seed)).to(latents_BKD.dtype)


def truncate(latents_BKD: Tensor, length: int) -> Tensor:
    """(B, length, D): the first slots only. Keeps them as they are; the other positions are gone."""
    return latents_BKD[:, :length]


def drop_all(latents_BKD: Tensor) -> Tensor:
    """(B, 0, D): no position is left. Keeps only what stands around the latents."""
    return latents_BKD[:, :0]


def oracle(latents_BKD: Tensor, pooled_BKD: Tensor) -> Tensor:
    """The image's own embeddings pooled to K. Keeps the image; nothing of the latents but their number."""
    assert pooled_BKD.shape == latents_BKD.shape, "pooled embeddings of the same images, K and width"
    return pooled_BKD.to(latents_BKD)


def _gaussian_like(latents_BKD: Tensor, model_ND: Tensor, seed: int) -> Tensor:
    std_D, mean_D = torch.std_mean(model_ND.float(), dim=0, correction=0)
    return (mean_D + std_D * _normal_like(latents_BKD, seed)).to(latents_BKD.dtype)


def _normal_like(latents_BKD: Tensor, seed: int) -> Tensor:
    """Float32 normal noise that is the same on every device, from a stream of its own."""
    rng = np.random.default_rng([seed, 3])
    noise = rng.standard_normal(tuple(latents_BKD.shape), dtype=np.float32)
    return torch.from_numpy(noise).to(latents_BKD.device)
