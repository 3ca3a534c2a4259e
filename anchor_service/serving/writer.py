"""The served generator: encoded images in, latents out. No Ray here.

Legend: B entries, K latents, D width, I × J the grid of image tokens.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image

from anchor_service.serving.concurrency import Batcher
from shared.config import Config
from shared.errors import DataError, ModelError
from shared.images import decode_image
from shared.run_folder import trained_generator
from shared.vlm import ImageTokens
from shared.vlm.latent_attention import attention_map, latent_attention

Entry = Sequence[bytes]
"""The encoded images of one record."""
_HEAT_RGB = (255, 80, 0)
_HEAT_PX = 256
_MOST_OPAQUE = 200


class LatentWriter:
    """All of its model's work is done by one thread; its methods are for an event loop."""

    def __init__(self, run: Config, device: str, batch_requests: int, max_pixels: int):
        config = run.generator.model_copy(update={"device": device})
        self._generator = trained_generator(run.model_copy(update={"generator": config}))
        self._generator.train(False)
        self._max_pixels = max_pixels
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generator")
        self._emit: Batcher[Entry, np.ndarray] = Batcher(
            lambda entries: self._in_thread(self._write, entries), batch_requests
        )
        self._images = 0

    async def emit(self, images: Entry) -> np.ndarray:
        """(K, D) float32 latents of one record. Calls that wait together share a pass.

        Raises DataError for images that cannot be taken.
        """
        return await self._emit(images)

    async def attention_png(self, image: bytes) -> bytes | None:
        """Where the latents look, the mean over latents, heads and layers, as a transparent PNG to lay over the image.

        None if the image tokens lie on no grid. Raises DataError.
        """
        png: bytes | None = await self._in_thread(self._attention_png, image)
        return png

    async def state(self) -> dict[str, float]:
        """Counters, for metrics and tests."""
        return {"images": self._images}

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    @torch.no_grad()
    def _write(self, entries: Sequence[Entry]) -> list[np.ndarray | Exception]:
        results: list[Any] = [self._decoded(entry) for entry in entries]
        good = [i for i, images in enumerate(results) if not isinstance(images, Exception)]
        if good:
            for i, written in zip(good, self._latents([results[i] for i in good]), strict=True):
                results[i] = written
        return results

    def _latents(self, rows: Sequence[Sequence[Image.Image]]) -> list[np.ndarray | Exception]:
        try:
            tokens = self._tokens(rows)
        except ValueError as error:
            # The image processor refuses a shape; alone, its record is found.
            if len(rows) == 1:
                reason = " ".join(str(error).split())[:200]
                return [DataError(f"the model cannot take this image ({reason})")]
            return [result for row in rows for result in self._latents([row])]
        self._images += len(tokens.tokens)
        return list(self._generator.emit(tokens).float().cpu().numpy())

    def _tokens(self, rows: Sequence[Sequence[Image.Image]]) -> ImageTokens:
        inputs = self._generator.model.image_inputs([image for row in rows for image in row])
        return self._generator.image_tokens_from(inputs).in_rows([len(row) for row in rows])

    def _decoded(self, entry: Entry) -> list[Image.Image] | DataError:
        try:
            return [decode_image(data, self._max_pixels) for data in entry]
        except DataError as error:
            return error

    def _attention_png(self, data: bytes) -> bytes | None:
        image = decode_image(data, self._max_pixels)
        try:
            (attention,) = latent_attention(self._generator, [image])
        except ModelError:
            return None
        return heat_png(attention_map(attention, "mean").mean(dim=0).numpy())


def heat_png(heat_IJ: np.ndarray) -> bytes:
    """A PNG of one colour, the more opaque the larger the value."""
    opacity_IJ = np.round(_MOST_OPAQUE * heat_IJ / max(float(heat_IJ.max()), 1e-12)).astype(np.uint8)
    rgba = np.zeros((*heat_IJ.shape, 4), dtype=np.uint8)
    rgba[..., :3], rgba[..., 3] = _HEAT_RGB, opacity_IJ
    scale = max(1, _HEAT_PX // max(heat_IJ.shape))
    picture = Image.fromarray(rgba).resize(
        (heat_IJ.shape[1] * scale, heat_IJ.shape[0] * scale), Image.Resampling.NEAREST
    )
    with io.BytesIO() as file:
        picture.save(file, "PNG")
        return file.getvalue()
