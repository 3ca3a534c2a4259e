"""Odd and hostile images: each becomes upright 8-bit RGB, or an error that says why."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared.errors import DataError
from shared.images import decode_image

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    with io.BytesIO() as file:
        image.save(file, form, **options)
        return file.getvalue()


def half_and_half(size: tuple[int, int] = (16, 8)) -> Image.Image:
    """Red at the left, blue at the right."""
    image = Image.new("RGB", size, "blue")
    image.paste("red", (0, 0, size[0] // 2, size[1]))
    return image


def cmyk() -> bytes:
    return encoded(half_and_half().convert("CMYK"), "JPEG", quality=100)


def sixteen_bit() -> bytes:
    values = np.zeros((8, 16), dtype=np.uint16)
    values[:, :8] = 128 * 257
    return encoded(Image.fromarray(values), "PNG")


def palette_with_transparency() -> bytes:
    image = half_and_half().convert("P", palette=Image.Palette.ADAPTIVE)
    return encoded(image, "PNG", transparency=image.getpixel((15, 0)))


def exif_rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to view
    return encoded(half_and_half(), "JPEG", exif=exif, quality=100)


def animation() -> bytes:
    frames = [half_and_half(), Image.new("RGB", (16, 8), "green")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def bilevel_tiff() -> bytes:
    return encoded(half_and_half().convert("1", dither=Image.Dither.NONE), "TIFF")


def webp() -> bytes:
    return encoded(half_and_half(), "WEBP", lossless=True)


def half_transparent() -> bytes:
    return encoded(Image.new("RGBA", (16, 8), (255, 0, 0, 0)), "PNG")


@pytest.mark.parametrize(
    ("make", "size", "first", "last"),
    [
        (cmyk, (16, 8), RED, (0, 0, 255)),
        (sixteen_bit, (16, 8), (128, 128, 128), (0, 0, 0)),
        (palette_with_transparency, (16, 8), RED, WHITE),
        (exif_rotated, (8, 16), RED, (0, 0, 255)),
        (animation, (16, 8), RED, (0, 0, 255)),
        (bilevel_tiff, (16, 8), (0, 0, 0), (0, 0, 0)),
        (webp, (16, 8), RED, (0, 0, 255)),
        (half_transparent, (16, 8), WHITE, WHITE),
    ],
)
def test_odd_images_become_upright_rgb(
    make: Callable[[], bytes], size: tuple[int, int], first: tuple[int, ...], last: tuple[int, ...]
) -> None:
    image = decode_image(make())
    assert (image.mode, image.size) == ("RGB", size)
    corners = np.array([image.getpixel((0, 0)), image.getpixel((size[0] - 1, size[1] - 1))], dtype=int)
    assert np.abs(corners - np.array([first, last])).max() <= 3


@cache
def bomb() -> bytes:
    """A PNG of 20,000×20,000 black pixels, all there, in half a megabyte."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")

    header = (20_000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(20_001)) for _ in range(20_000)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (bomb, "400000000 pixels"),
        (lambda: b"", "cannot identify image file"),
        (lambda: encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")[:900], "truncated"),
        (lambda: encoded(Image.effect_noise((64, 64), 50), "PNG")[:900], "truncated|broken"),
        (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "cannot identify image file"),
    ],
    ids=["bomb", "empty file", "JPEG cut short", "PNG cut short", "a format that is not taken"],
)
def test_hostile_and_damaged_images_are_refused(make: Callable[[], bytes], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        decode_image(make())


def test_the_bound_on_pixels_is_the_callers() -> None:
    image = encoded(half_and_half(), "PNG")
    assert decode_image(image, max_pixels=128).size == (16, 8)
    with pytest.raises(DataError, match="16×8 pixels, more than 127 in all"):
        decode_image(image, max_pixels=127)
