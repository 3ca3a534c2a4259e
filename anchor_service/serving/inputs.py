"""From what clients send to bytes and arrays, checked against the service's limits. Nothing is unpickled.

Legend: B entries, K latents, D width.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence

import numpy as np

from anchor_service.serving.errors import ServiceError
from anchor_service.serving.schema import EncodedLatents
from shared.serve_config import LimitsConfig


def decoded_url(url: str) -> bytes:
    """The bytes of a data URL."""
    _, _, text = url.partition(",")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ServiceError(422, "invalid_image", "the image's data URL is not valid base64") from error


def checked_latents(given: EncodedLatents | list[list[float]], shape: tuple[int, int], max_norm: float) -> np.ndarray:
    """(K, D) float32 latents from outside. Raises ServiceError that names what is wrong and the bound."""
    values_KD = _decoded(given, shape)
    if values_KD.shape != shape:
        raise _invalid(f"latents have shape {list(values_KD.shape)}, expected {list(shape)} (latents, width)")
    if not np.isfinite(values_KD).all():
        raise _invalid("latents hold NaN or infinite values")
    norm = float(np.linalg.norm(values_KD.astype(np.float64), axis=1).max())
    if norm > max_norm:
        raise _invalid(f"a latent has length {norm:.3g}, more than {max_norm:g}, which is the limit")
    return values_KD


def check_count(n: int, limit: int, what: str) -> None:
    """Raises ServiceError if there are too many."""
    if n > limit:
        raise ServiceError(422, "too_many", f"{n} {what}, more than {limit}, which is the limit")


def check_words(texts: Sequence[str], limits: LimitsConfig, special_tokens: frozenset[str]) -> None:
    """Raises ServiceError for a text that is empty, too long, or holds what a chat template is made of."""
    for text in texts:
        if not text.strip():
            raise ServiceError(422, "empty_text", "a question or an answer is empty")
        if len(text) > limits.question_characters:
            limit = limits.question_characters
            raise ServiceError(
                422, "text_too_long", f"a text has {len(text)} characters, more than {limit}, which is the limit"
            )
        for token in special_tokens:
            if token in text:
                raise ServiceError(422, "special_token", f"a text holds the special token {token}; leave it out")


def digest_of(images: Sequence[bytes]) -> str:
    """Equal for equal images in equal order."""
    return hashlib.sha256(b"".join(hashlib.sha256(image).digest() for image in images)).hexdigest()


def noise_like(latents_KD: np.ndarray, digest: str) -> np.ndarray:
    """Directions at random, the same for the same image; each latent keeps its length."""
    rng = np.random.default_rng(int(digest[:16], 16))
    noise_KD = rng.standard_normal(latents_KD.shape)
    lengths_K1 = np.linalg.norm(latents_KD, axis=1, keepdims=True) / np.linalg.norm(noise_KD, axis=1, keepdims=True)
    scaled_KD: np.ndarray = (noise_KD * lengths_K1).astype(np.float32)
    return scaled_KD


def _decoded(given: EncodedLatents | list[list[float]], shape: tuple[int, int]) -> np.ndarray:
    if isinstance(given, EncodedLatents):
        if given.shape != shape:
            raise _invalid(f"latents have shape {list(given.shape)}, expected {list(shape)} (latents, width)")
        try:
            data = base64.b64decode(given.data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise _invalid("the latents' data is not valid base64") from error
        if len(data) != 4 * shape[0] * shape[1]:
            raise _invalid(f"the latents' data has {len(data)} bytes, expected {4 * shape[0] * shape[1]}")
        return np.frombuffer(data, dtype="<f4").reshape(shape).astype(np.float32)
    if len({len(row) for row in given}) > 1:
        raise _invalid("the latents' rows differ in length")
    with np.errstate(over="ignore"):  # beyond float32 is infinite, which is refused with a reason
        return np.array(given, dtype=np.float64).reshape(len(given), -1 if given else 0).astype(np.float32)


def _invalid(message: str) -> ServiceError:
    return ServiceError(422, "invalid_latents", message)
