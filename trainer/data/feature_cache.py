"""Image tokens on disk, one file per image and vision tower, in a folder that any number of runs may share.

    PATH/KEY.features     SHA-256 of key and payload (32 bytes), then the payload: tensors in the safetensors format
    PATH/*.partial        being written, or left by a writer that was killed and dropped an hour later

KEY is the SHA-256 of the tower's revision and the image file's bytes, so another image, other weights or another
image processor never meet an entry that is not theirs. Entries appear by a rename and are never changed, so no
locks are needed: two writers of one key write the same, and a reader whose entry is evicted just misses.

The time of a file's last change is that of its last use. A writer looks through the folder each time that it has
written 1/64 of the cap, and drops what was used longest ago until 1/16 of the cap is free: up to four concurrent
writers stay below the cap, each further one may pass it by 1/64.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import PIL
import torch
import transformers
from safetensors.torch import load, save
from torch import Tensor

from shared.config import FeatureCacheConfig
from shared.errors import ConfigError
from shared.vlm import ImageTokens, VisionLanguageModel

log = logging.getLogger(__name__)

_FORMAT = 1  # to be raised when the same model and image would give other features, or files another content
_ENTRY, _PARTIAL = ".features", ".partial"
_DIGEST_BYTES = 32
_STALE_S = 3600.0


class FeatureCache:
    """`read` from any thread, `write` from one. What was written is on disk after `close`."""

    def __init__(self, config: FeatureCacheConfig, revision: bytes):
        self._folder = config.path
        self._cap_bytes = int(config.max_gib * 2**30)
        self._revision = revision
        self._bytes_since_scan = 0
        self._has_failed = False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._evict()
        except OSError as error:
            raise ConfigError(f"data.feature_cache.path: {self._folder} cannot be used ({error})") from error
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feature-cache")
        self._writing: Future[None] | None = None

    def key(self, image_bytes: bytes) -> str:
        """Name of the entry of an image file with this content."""
        return hashlib.sha256(self._revision + image_bytes).hexdigest()

    def read(self, key: str) -> ImageTokens | None:
        """The tokens of one image, on the CPU; None if there are none, or, with a warning, if they are damaged."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s: the cached features cannot be read (%s); they are computed again", path, error)
            return None
        payload = content[_DIGEST_BYTES:]
        if _digest(key, payload) != content[:_DIGEST_BYTES]:
            log.warning("%s: the cached features are damaged; they are computed again", path)
            return None
        with contextlib.suppress(OSError):  # evicted meanwhile, or somebody else's folder
            os.utime(path)
        return _from_tensors(load(payload))

    def write(self, images: Mapping[str, ImageTokens]) -> None:
        """Store entries of one image each, by key, in the background, once those of the call before are stored.

        A full disk costs a warning, not the run.
        """
        self._wait()
        self._writing = self._writer.submit(self._write_all, images)

    def close(self) -> None:
        """Wait for the last entries."""
        self._writer.shutdown(wait=True)
        self._wait()

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _write_all(self, images: Mapping[str, ImageTokens]) -> None:
        try:
            for key, image in images.items():
                payload = save(_to_tensors(image))
                if self._bytes_since_scan + len(payload) > self._cap_bytes // 64:
                    self._evict()
                self._bytes_since_scan += len(payload) + _DIGEST_BYTES
                self._write_file(self._path(key), _digest(key, payload) + payload)
        except OSError as error:
            if not self._has_failed:
                log.warning("%s: features cannot be cached (%s); the run goes on without", self._folder, error)
            self._has_failed = True

    def _write_file(self, path: Path, content: bytes) -> None:
        partial = path.with_suffix(f".{uuid.uuid4().hex}{_PARTIAL}")
        try:
            partial.write_bytes(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _evict(self) -> None:
        """Drop what killed writers left and, until 1/16 of the cap is free, what was used longest ago."""
        entries: list[tuple[int, int, str]] = []
        for file in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):  # another writer renamed or dropped it
                stat = file.stat()
                if file.name.endswith(_ENTRY):
                    entries.append((stat.st_mtime_ns, stat.st_size, file.path))
                elif file.name.endswith(_PARTIAL) and time.time() - stat.st_mtime > _STALE_S:
                    Path(file.path).unlink()
        too_much = sum(size for _, size, _ in entries) - self._cap_bytes * 15 // 16
        for _, size, path in sorted(entries):
            if too_much <= 0:
                break
            Path(path).unlink(missing_ok=True)
            too_much -= size
        self._bytes_since_scan = 0

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_ENTRY}"


def tower_revision(model: VisionLanguageModel) -> bytes:
    """A digest of all that an image's tokens depend on beside the image.

    These are the weights outside of the decoder (tower and projection), their config, the image processor's
    settings, the device's kind and the libraries. Hashes the weights once: a second or two per gigabyte.
    """
    hf_config: Any = model.hf_model.config
    config = hf_config.to_dict()
    for unrelated in ("text_config", "_name_or_path"):
        config.pop(unrelated, None)
    versions = (_FORMAT, torch.__version__, transformers.__version__, PIL.__version__, model.device.type)
    settings = (versions, config, model.processor.image_processor.to_dict())
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.inner.state_dict().items()):
        if not name.startswith(f"{model.family.decoder}."):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.digest()


def split_images(tokens: ImageTokens) -> list[ImageTokens]:
    """A batch as batches of one image each."""
    sizes = [len(t) for t in tokens.tokens]
    layers = [layer.split(sizes) for layer in tokens.deepstack]
    return [
        ImageTokens([t], [grid], [layer[b] for layer in layers])
        for b, (t, grid) in enumerate(zip(tokens.tokens, tokens.grids, strict=True))
    ]


def join_images(images: Sequence[ImageTokens]) -> ImageTokens:
    """The inverse of `split_images`."""
    layers = zip(*(image.deepstack for image in images), strict=True)
    return ImageTokens(
        [t for image in images for t in image.tokens],
        [grid for image in images for grid in image.grids],
        [torch.cat(layer) for layer in layers],
    )


def to_device(tokens: ImageTokens, device: torch.device) -> ImageTokens:
    """The same tokens on a device."""
    return ImageTokens([t.to(device) for t in tokens.tokens], tokens.grids, [x.to(device) for x in tokens.deepstack])


def _to_tensors(image: ImageTokens) -> dict[str, Tensor]:
    tensors = {f"deepstack.{n}": layer for n, layer in enumerate(image.deepstack)}
    tensors["tokens"] = image.tokens[0]
    if image.grids[0] is not None:
        tensors["grid"] = torch.tensor(image.grids[0])
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _from_tensors(tensors: dict[str, Tensor]) -> ImageTokens:
    grid = (int(tensors["grid"][0]), int(tensors["grid"][1])) if "grid" in tensors else None
    layers = [tensors[f"deepstack.{n}"] for n in range(sum(name.startswith("deepstack.") for name in tensors))]
    return ImageTokens([tensors["tokens"]], [grid], layers)


def _digest(key: str, payload: bytes) -> bytes:
    return hashlib.sha256(key.encode() + payload).digest()
