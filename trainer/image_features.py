"""From records to image tokens in three steps, the first two of which run in the loader's threads or processes.

    open       read a record's images; look their features up in the cache, or decode them
    prepare    the image processor, unless every image was in the cache
    tokens     the vision tower, unless every image was in the cache; what was not is written there

A batch with an image that is not cached is computed as a whole, as without a cache. Matrix products of another size
may sum in another order: on two CPU threads, the toy tower's last bits are others for a lone image than for the same
image among two, three or 32, which all agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from shared.config import FeatureCacheConfig
from shared.vlm import ImageTokens
from shared.vlm.generator import Generator
from trainer.data.feature_cache import FeatureCache, join_images, split_images, to_device, tower_revision
from trainer.data.records import Record


@dataclass(frozen=True, slots=True)
class OpenedImages:
    """One record's images, each as its cached features or decoded. encoded, keys: with a cache only."""

    record: Record
    contents: Sequence[Image.Image | ImageTokens]
    encoded: Sequence[bytes] = ()
    keys: Sequence[str] = ()

    def pictures(self) -> list[Image.Image]:
        """Decoded, also where features were found."""
        pictures = [content for content in self.contents if isinstance(content, Image.Image)]
        return pictures if len(pictures) == len(self.contents) else self.record.load_images(self.encoded)


@dataclass(frozen=True, slots=True)
class PreparedImages:
    """A batch: its features, on the CPU, if all were cached, else the tower's inputs.

    per_row: images of each record. missing: places among all images of what was not cached, by key. hit_share: share of
    images that were cached.
    """

    per_row: list[int]
    features: ImageTokens | None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    hit_share: float = 1.0


class ImagePreparer:
    """The two steps that need no weights. image_inputs: the image processor."""

    def __init__(self, image_inputs: Callable[[Sequence[Image.Image]], dict[str, Tensor]], cache: FeatureCache | None):
        self._image_inputs, self._cache = image_inputs, cache

    def open(self, record: Record) -> OpenedImages:
        """Read one record's images. Raises DataError naming image and record."""
        if self._cache is None:
            return OpenedImages(record, record.load_images())
        encoded = record.image_bytes()
        keys = [self._cache.key(data) for data in encoded]
        found = [self._cache.read(key) for key in keys]
        if None not in found:
            return OpenedImages(record, [features for features in found if features is not None], encoded, keys)
        decoded = record.load_images(encoded)
        return OpenedImages(record, [f or d for f, d in zip(found, decoded, strict=True)], encoded, keys)

    def prepare(self, records: Sequence[OpenedImages]) -> PreparedImages:
        """What `tokens` needs of a batch. Thread-safe."""
        per_row = [len(record.contents) for record in records]
        contents = [content for record in records for content in record.contents]
        cached = [content for content in contents if isinstance(content, ImageTokens)]
        if len(cached) == len(contents):
            return PreparedImages(per_row, join_images(cached))
        inputs = self._image_inputs([picture for record in records for picture in record.pictures()])
        keys = [key for record in records for key in record.keys]
        missing = {key: i for i, key in enumerate(keys) if isinstance(contents[i], Image.Image)}
        return PreparedImages(per_row, None, inputs, missing, len(cached) / len(contents))


class ImageFeatures(ImagePreparer):
    """The generator's view of images, with or without a cache."""

    def __init__(self, generator: Generator, config: FeatureCacheConfig | None):
        cache = None if config is None else FeatureCache(config, tower_revision(generator.model))
        super().__init__(generator.model.image_inputs, cache)
        self._generator = generator

    def tokens(self, images: PreparedImages) -> ImageTokens:
        """Visual tokens of a batch, on the generator's device, without a graph."""
        if images.features is not None:
            return to_device(images.features, self._generator.model.device).in_rows(images.per_row)
        tokens = self._generator.image_tokens_from(images.inputs)
        if self._cache is not None:
            single = split_images(tokens)
            self._cache.write({key: single[i] for key, i in images.missing.items()})
        return tokens.in_rows(images.per_row)

    def of_records(self, records: Sequence[Record]) -> ImageTokens:
        """All three steps at once."""
        return self.tokens(self.prepare([self.open(record) for record in records]))

    def metrics(self, parts: Sequence[PreparedImages]) -> dict[str, float]:
        """Share of a step's images that were in the cache; nothing without a cache."""
        if self._cache is None:
            return {}
        return {"feature_cache_hits": sum(part.hit_share for part in parts) / len(parts)}

    def close(self) -> None:
        """Finish writing to the cache."""
        if self._cache is not None:
            self._cache.close()
