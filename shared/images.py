"""Images from outside, decoded safely: bounded in size, of few formats, always upright 8-bit RGB."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, WebPImagePlugin  # noqa: F401 - the last two enter themselves in Pillow

from shared.errors import DataError

MAX_IMAGE_PIXELS = 100_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def decode_image(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """The image as RGB, turned as its EXIF data says; of an animation the first frame; over white where transparent.

    16-bit grey is scaled to 8 bits. Raises DataError with the reason alone: no image, cut short, over `max_pixels`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height <= max_pixels:
                return _rgb(ImageOps.exif_transpose(image))
            size = image.size
    except Exception as error:  # Pillow's readers raise nearly anything on damaged files
        raise DataError(_reason(error)) from error
    raise _too_large(size, max_pixels)


def check_header(path: Path, max_pixels: int = MAX_IMAGE_PIXELS) -> None:
    """Raise DataError with the reason alone, if a file does not begin as an image of such a size does."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            size = image.size
    except FileNotFoundError:
        raise
    except Exception as error:
        raise DataError(_reason(error)) from error
    if size[0] * size[1] > max_pixels:
        raise _too_large(size, max_pixels)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _too_large(size: tuple[int, int], max_pixels: int) -> DataError:
    return DataError(f"{size[0]}×{size[1]} pixels, more than {max_pixels} in all")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # convert() would cut 16-bit values off at 255
        values_HW = np.asarray(image, dtype=np.float64)
        scale = 257 if image.mode.startswith("I") else 1
        image = Image.fromarray(np.clip(np.nan_to_num(values_HW) / scale, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
