"""Pictures made from images of the data set: attention maps over samples, and the failure gallery.

Legend: K latents, I × J the grid of image tokens.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from shared.vlm.latent_attention import RULES, AttentionRule
from trainer.data.records import Record
from trainer.report.drawing import draw, heat_tiles
from trainer.report.page import GalleryCard, Picture
from trainer.report.results import Failure, RunResults

_MOST_CARDS = 24
_MOST_LATENTS = 10
_CARD_PX = 224


def attention_pictures(run: RunResults, rule: AttentionRule) -> list[Picture]:
    """Heat maps of the first test images."""
    samples = run.states.attention if run.states is not None else []
    return [_attention_picture(i, record, map_KIJ, rule) for i, (record, map_KIJ) in enumerate(samples)]


def gallery(failures: Sequence[Failure]) -> list[GalleryCard]:
    """Cards of the first failures, images made small or, from tiny ones, large enough to be seen."""
    return [
        GalleryCard(
            _thumbnail(failure),
            failure.question,
            failure.kind,
            failure.gold,
            failure.record,
            [(name, answer, name not in failure.wrong) for name, answer in failure.answers.items()],
        )
        for failure in failures[:_MOST_CARDS]
    ]


def _attention_picture(index: int, record: Record, map_KIJ: np.ndarray, rule: AttentionRule) -> Picture:
    shown = map_KIJ[:_MOST_LATENTS]
    heats = {"mean": map_KIJ.mean(axis=0)} | {f"latent {k}": heat_IJ for k, heat_IJ in enumerate(shown)}
    (image,) = record.load_images()
    rows, columns = map_KIJ.shape[1:]
    on_image = map_KIJ.sum(axis=(1, 2))
    row, column = np.unravel_index(heats["mean"].argmax(), (rows, columns))
    some = f" The first {len(shown)} of {len(map_KIJ)} latents are shown." if len(shown) < len(map_KIJ) else ""
    return Picture(
        f"attention-{index}",
        f"Attention of the latents over image {record.record_id}, {RULES[rule]}; the rest of each latent's attention "
        f"goes to text, itself and other latents.{some}",
        f"Heat maps of {len(map_KIJ)} latents over the {rows} × {columns} image tokens of record {record.record_id}. "
        f"{100 * on_image.mean():.0f} % of attention falls on the image ({100 * on_image.min():.0f} to "
        f"{100 * on_image.max():.0f} % by latent), most of it on row {row + 1}, column {column + 1}.",
        *draw(lambda _: heat_tiles(image, heats, "share of a latent's attention")),
    )


def _rgb(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        return opened.convert("RGB")


def _thumbnail(failure: Failure) -> bytes | None:
    """The images side by side, enlarged or made smaller to the width of a card; None if one cannot be read."""
    try:
        images = [_rgb(path) for path in failure.images]
    except (OSError, ValueError, SyntaxError):
        return None
    with io.BytesIO() as file:
        side_by_side(images).save(file, format="PNG")
        return file.getvalue()


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Images beside each other, enlarged or made smaller to the width of a card."""
    image = Image.new("RGB", (sum(i.width for i in images), max(i.height for i in images)), "white")
    for n, part in enumerate(images):
        image.paste(part, (sum(i.width for i in images[:n]), 0))
    scale = _CARD_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
