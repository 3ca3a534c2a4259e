"""Images from outside, decoded safely: bounded in size, of few formats, always upright 8-bit RGB."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from shared.errors import DataError

MAX_IMAGE_PIXELS = 100_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO")


def decode_image(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """The image as RGB, turned as its EXIF data says; of an animation the first frame; over white where transparent.

    16-bit grey is scaled to 8 bits. Raises DataError with the reason alone: no image, cut short, over `max_pixels`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height <= max_pixels:
                return _rgb(ImageOps.exif_transpose(image))
            problem = f"{image.width}×{image.height} pixels, more than {max_pixels} in all"
    except Image.DecompressionBombError as error:
        raise DataError(f"more than {max_pixels} pixels") from error
    except Exception as error:
        raise DataError(" ".join(str(error).split()) or type(error).__name__) from error
    raise DataError(problem)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # convert() would cut 16-bit values off at 255
        values_HW = np.asarray(image, dtype=np.float64)
        scale = 257 if image.mode.startswith("I") else 1
        image = Image.fromarray(np.clip(np.nan_to_num(values_HW) / scale, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
