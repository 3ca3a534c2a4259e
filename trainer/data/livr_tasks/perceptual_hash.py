"""A 64-bit perceptual hash: signs of the low frequencies of a small grey picture (Zauner 2010, pHash)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.fft import dctn

from trainer.data.livr_tasks.raw import files, read_image

_SIDE, _KEPT = 32, 8
SAME_BITS = 6
"""Two pictures are taken for the same if at most this many of the 64 bits differ; re-encoding changes one or two."""


def perceptual_hash(image: Image.Image) -> np.uint64:
    """The hash. Survives scaling, re-encoding and small changes of brightness."""
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    low = dctn(grey, norm="ortho")[:_KEPT, :_KEPT].ravel()
    bits = low > np.median(low[1:])  # the mean brightness, low[0], would shift the median
    return np.packbits(bits).view(">u8")[0].astype(np.uint64)


def seen_images(folder: Path | None) -> SeenImages:
    """Every image below a folder; none without a folder. Raises DataError if one cannot be read, or there is none."""
    if folder is None:
        return SeenImages()
    return SeenImages(read_image(file) for file in files(folder, ".png", ".jpg", ".jpeg", ".ppm", ".webp"))


class SeenImages:
    """Hashes of a test set, and whether a picture is among them."""

    def __init__(self, images: Iterable[Image.Image] = ()):
        self._hashes = np.array([perceptual_hash(image) for image in images], dtype=np.uint64)

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, image: object) -> bool:
        assert isinstance(image, Image.Image)
        if not len(self._hashes):
            return False
        differing = np.bitwise_xor(self._hashes, perceptual_hash(image))
        bits_N = np.unpackbits(differing.view(np.uint8).reshape(len(differing), 8), axis=1).sum(axis=1)
        return bool(bits_N.min() <= SAME_BITS)
