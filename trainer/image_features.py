"""From records to image tokens in three steps, the first two of which run in the loader thread.

    open       read the file; look its features up in the cache, or decode it
    prepare    the image processor, unless every image was in the cache
    tokens     the vision tower, unless every image was in the cache; what was not is written there

A batch with an image that is not cached is computed as a whole, as without a cache. Matrix products of another size
may sum in another order: on two CPU threads, the toy tower's last bits are others for a lone image than for the same
image among two, three or 32, which all agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from shared.config import FeatureCacheConfig
from shared.vlm import ImageTokens
from trainer.data.feature_cache import FeatureCache, join_images, split_images, to_device, tower_revision
from trainer.data.records import Record
from trainer.generator import Generator


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """One image: its cached features, or what there is of it without."""

    record: Record
    content: Image.Image | ImageTokens
    image_bytes: bytes | None = None
    key: str = ""

    def picture(self) -> Image.Image:
        """Decoded, also where features were found."""
        if isinstance(self.content, Image.Image):
            return self.content
        return self.record.load_image(self.image_bytes)


@dataclass(frozen=True, slots=True)
class PreparedImages:
    """A batch: its features, on the CPU, if all were cached, else the tower's inputs.

    missing: places in the batch of what was not cached, by key. hit_share: share of images that were cached.
    """

    features: ImageTokens | None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    hit_share: float = 1.0


class ImageFeatures:
    """The generator's view of images, with or without a cache."""

    def __init__(self, generator: Generator, config: FeatureCacheConfig | None):
        self._generator = generator
        self._cache = None if config is None else FeatureCache(config, tower_revision(generator.model))

    def open(self, record: Record) -> OpenedImage:
        """Read one image. Raises DataError naming file and record."""
        if self._cache is None:
            return OpenedImage(record, record.load_image())
        image_bytes = record.image_bytes()
        key = self._cache.key(image_bytes)
        content = self._cache.read(key) or record.load_image(image_bytes)
        return OpenedImage(record, content, image_bytes, key)

    def prepare(self, images: Sequence[OpenedImage]) -> PreparedImages:
        """What `tokens` needs of a batch. Thread-safe."""
        cached = [image.content for image in images if isinstance(image.content, ImageTokens)]
        if len(cached) == len(images):
            return PreparedImages(join_images(cached))
        inputs = self._generator.model.image_inputs([image.picture() for image in images])
        missing = {image.key: b for b, image in enumerate(images) if isinstance(image.content, Image.Image)}
        return PreparedImages(None, inputs, missing, len(cached) / len(images))

    def tokens(self, images: PreparedImages) -> ImageTokens:
        """Visual tokens of a batch, on the generator's device, without a graph."""
        if images.features is not None:
            return to_device(images.features, self._generator.model.device)
        tokens = self._generator.image_tokens_from(images.inputs)
        if self._cache is not None:
            single = split_images(tokens)
            self._cache.write({key: single[b] for key, b in images.missing.items()})
        return tokens

    def metrics(self, parts: Sequence[PreparedImages]) -> dict[str, float]:
        """Share of a step's images that were in the cache; nothing without a cache."""
        if self._cache is None:
            return {}
        return {"feature_cache_hits": sum(part.hit_share for part in parts) / len(parts)}

    def close(self) -> None:
        """Finish writing to the cache."""
        if self._cache is not None:
            self._cache.close()
