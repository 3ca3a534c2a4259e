"""Image controls and perturbations: pure functions from RGB picture to RGB picture of the same size.

The size stays so that a model reads as many visual tokens as before. Those with chance in them take a seed; give
every image one of its own, for example [seed, index].
"""

from __future__ import annotations

import io
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import numpy as np
from PIL import Image, ImageFilter

from shared.errors import DataError

Seed = int | Sequence[int]
GREY = (128, 128, 128)


def perturbations(seed: Seed) -> dict[str, Callable[[Image.Image], Image.Image]]:
    """Those of one picture, by name with the strength: percent of the area, levels, pixels, quality.

    Another picture is not among them: its latents are those of the other record, which `mismatched` chooses.
    """
    return {
        "blank": blank,
        "shuffled_pixels": partial(shuffle_pixels, seed=seed),
        **{f"occlusion_{n}": partial(occlude, share=n / 100, seed=seed) for n in (10, 20, 30, 40, 50)},
        **{f"noise_{n}": partial(add_noise, sigma=n, seed=seed) for n in (8, 16, 32, 64)},
        **{f"blur_{n}": partial(blur, radius=n) for n in (1, 2, 4)},
        **{f"jpeg_{n}": partial(compress, quality=n) for n in (50, 25, 10)},
    }


def blank(image: Image.Image) -> Image.Image:
    """A grey picture. Keeps the size alone."""
    return Image.new("RGB", image.size, GREY)


def shuffle_pixels(image: Image.Image, seed: Seed) -> Image.Image:
    """All pixels in random places. Keeps how often each colour occurs."""
    pixels_HWC = np.asarray(image)
    shuffled = np.random.default_rng(seed).permutation(pixels_HWC.reshape(-1, 3))
    return Image.fromarray(shuffled.reshape(pixels_HWC.shape))


def occlude(image: Image.Image, share: float, seed: Seed) -> Image.Image:
    """A grey rectangle over `share` of the area, of the picture's own proportions, at a random place inside it.

    Sides are rounded to pixels. Keeps every pixel outside.
    """
    width, height = (max(1, round(side * share**0.5)) for side in image.size)
    rng = np.random.default_rng(seed)
    left = int(rng.integers(image.width - width + 1))
    top = int(rng.integers(image.height - height + 1))
    occluded = image.copy()
    occluded.paste(GREY, (left, top, left + width, top + height))
    return occluded


def add_noise(image: Image.Image, sigma: float, seed: Seed) -> Image.Image:
    """Gaussian noise of standard deviation `sigma`, in levels of 0 … 255, on every channel; clipped to that range."""
    noisy = np.asarray(image) + np.random.default_rng(seed).normal(0.0, sigma, (image.height, image.width, 3))
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def blur(image: Image.Image, radius: float) -> Image.Image:
    """Gaussian blur of standard deviation `radius`, in pixels."""
    return image.filter(ImageFilter.GaussianBlur(radius))


def compress(image: Image.Image, quality: int) -> Image.Image:
    """Through JPEG of this quality (1 … 95) and back."""
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(data).convert("RGB")


def mismatched(answers_B: Sequence[Hashable], seed: int) -> np.ndarray:
    """For each image the index of a random image whose answer differs. Raises DataError where there is none."""
    indices_by_answer = {
        answer: np.array([i for i, other in enumerate(answers_B) if other != answer]) for answer in set(answers_B)
    }
    for answer, indices in indices_by_answer.items():
        if not len(indices):
            raise DataError(f"mismatched images: every answer is {answer!r}; evaluate on more images")
    rng = np.random.default_rng(seed)
    return np.array([rng.choice(indices_by_answer[answer]) for answer in answers_B])
