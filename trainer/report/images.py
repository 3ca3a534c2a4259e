"""Pictures made from images of the data set: attention maps over samples, and the failure gallery."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from shared.errors import CheckpointError, DataError
from trainer.checkpoint import CheckpointStore
from trainer.data import load_records
from trainer.data.records import Record
from trainer.generator import Generator
from trainer.report.attention import RULES, AttentionRule, attention_map, latent_attention
from trainer.report.drawing import draw, heat_tiles
from trainer.report.page import GalleryCard, Picture
from trainer.report.results import Failure, RunResults

_SAMPLES = 4
_MOST_CARDS = 24
_MOST_LATENTS = 10
_CARD_PX = 224
_ARRAYS = {"mean": "attention", "last": "attention_last"}


def attention_pictures(run: RunResults, rule: AttentionRule) -> list[Picture]:
    """Heat maps of the first test images, from the evaluation's arrays or else from the evaluated checkpoint.

    Raises CheckpointError, DataError or ModelError where checkpoint, images or model are missing.
    """
    records = load_records(run.config.data, run.config.data.test_split)
    samples, maps_NKIJ = _stored_maps(run, records, rule) or _computed_maps(run, records, rule)
    return [_attention_picture(i, *sample, rule) for i, sample in enumerate(zip(samples, maps_NKIJ, strict=True))]


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


def _stored_maps(
    run: RunResults, records: Sequence[Record], rule: AttentionRule
) -> tuple[list[Record], list[np.ndarray]] | None:
    stored, ids = run.arrays.get(_ARRAYS.get(rule, "")), run.arrays.get("record_ids")
    if stored is None or ids is None:
        return None
    by_id = {record.record_id: record for record in records}
    absent = [str(name) for name in ids[:_SAMPLES] if str(name) not in by_id]
    if absent:
        raise DataError(f"{run.config.data.path}: record {absent[0]} was evaluated but is no longer in the test split")
    return [by_id[str(name)] for name in ids[:_SAMPLES]], list(stored[:_SAMPLES])


def _computed_maps(
    run: RunResults, records: Sequence[Record], rule: AttentionRule
) -> tuple[list[Record], list[np.ndarray]]:
    checkpoint = CheckpointStore(run.config.run.dir, run.config.train.keep_checkpoints).best()
    if checkpoint is None:
        raise CheckpointError(f"{run.config.run.dir}: no checkpoint to take attention from")
    generator = Generator(run.config.generator, run.config.train.seed)
    generator.load_adapter(checkpoint.folder)
    samples = list(records[:_SAMPLES])
    attentions = latent_attention(generator, [record.load_image() for record in samples])
    return samples, [attention_map(attention, rule).numpy() for attention in attentions]


def _attention_picture(index: int, record: Record, map_KIJ: np.ndarray, rule: AttentionRule) -> Picture:
    shown = map_KIJ[:_MOST_LATENTS]
    heats = {"mean": map_KIJ.mean(axis=0)} | {f"latent {k}": heat_IJ for k, heat_IJ in enumerate(shown)}
    image = record.load_image()
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


def _thumbnail(failure: Failure) -> bytes | None:
    try:
        with Image.open(failure.image) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError):
        return None
    scale = _CARD_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    with io.BytesIO() as file:
        image.save(file, format="PNG")
        return file.getvalue()
