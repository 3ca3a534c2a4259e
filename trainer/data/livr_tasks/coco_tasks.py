"""Jigsaw and object localization from COCO 2017 (Lin et al. 2014), counting from PixMo-Count (Deitke et al. 2024).

COCO:   annotations/instances_train2017.json, train2017/*.jpg (any folder below may hold the images)
PixMo:  parquet with `label`, `count` and either the image itself (`image`) or `image_sha256`, under which name the
        downloaded images lie in images/
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from shared.errors import DataError
from trainer.data.livr_tasks.drawing import Box, intersection_over_union, with_box
from trainer.data.livr_tasks.example import Example, multiple_choice, place_of_answer
from trainer.data.livr_tasks.raw import files, groups_of, read_image, read_json, shuffled

COUNTS = range(2, 11)
"""Counts that are asked for, as in PixMo-Count's human-checked splits."""

_JITTER_IOU = (0.2, 0.5)
_LEAST_BOX_SHARE = 0.02
_MOST_BOX_SHARE = 0.6
_JITTER_TRIES = 200
_IMAGES = (".jpg", ".jpeg", ".png")


def jigsaw(raw: Path, rng: np.random.Generator) -> Iterator[Example]:
    """A COCO image without its bottom-right quadrant; which of two pieces is missing?

    The wrong piece is cut from the same image, elsewhere; it may overlap the right one by less than half.
    """
    for file in shuffled(files(raw, *_IMAGES), rng):
        image = read_image(file)
        width, height = image.width // 2, image.height // 2
        if min(width, height) < 16:
            continue
        missing = (image.width - width, image.height - height, image.width, image.height)
        cut = image.copy()
        cut.paste((0, 0, 0), missing)
        pieces = [image.crop(_elsewhere(image, missing, rng))]
        place, answer = place_of_answer(2, rng)
        pieces.insert(place, image.crop(missing))
        question = "The lower right corner of the first image is missing. Which image shows the missing part?"
        yield Example(
            (cut, *pieces),
            multiple_choice(question, ["the second image", "the third image"]),
            answer,
            (file.name,),
            (image,),
        )


def _elsewhere(
    image: Image.Image, missing: tuple[int, int, int, int], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A box of the same size that shares less than half of its area with `missing`."""
    width, height = missing[2] - missing[0], missing[3] - missing[1]
    while True:
        x, y = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
        box = (x, y, x + width, y + height)
        if intersection_over_union(box, missing) < 1 / 3:  # half of each of two equal boxes
            return box


def object_localization(raw: Path, rng: np.random.Generator) -> Iterator[Example]:
    """Which of two boxes fits an object better: its own, or one moved and scaled to an IoU of 0.2 to 0.5 with it."""
    content = read_json(raw / "annotations" / "instances_train2017.json")
    names = {category["id"]: category["name"] for category in content["categories"]}
    paths = {file.name: file for file in files(raw, *_IMAGES)}
    objects = groups_of(content["annotations"], lambda a: str(a["image_id"]))
    for entry in shuffled(content["images"], rng):
        candidates = [a for a in objects.get(str(entry["id"]), []) if _asks_well(a, entry, objects[str(entry["id"])])]
        if not candidates or entry["file_name"] not in paths:
            continue
        chosen = candidates[rng.integers(len(candidates))]
        image = read_image(paths[entry["file_name"]])
        x, y, width, height = chosen["bbox"]
        own: Box = (x, y, x + width, y + height)
        wrong = jittered(own, image.size, rng)
        if wrong is None:
            continue
        place, answer = place_of_answer(2, rng)
        boxes = [wrong]
        boxes.insert(place, own)
        name = names[chosen["category_id"]]
        question = f"Which box fits the {name} more accurately, that of the first or that of the second image?"
        pictures = tuple(with_box(image, box, label) for box, label in zip(boxes, "AB", strict=True))
        yield Example(pictures, multiple_choice(question, ["Box A", "Box B"]), answer, (entry["file_name"],), (image,))


def _asks_well(annotation: dict[str, Any], image: dict[str, Any], others: list[dict[str, Any]]) -> bool:
    """One object of its category, no crowd, neither tiny nor most of the image."""
    share = annotation["bbox"][2] * annotation["bbox"][3] / (image["width"] * image["height"])
    of_its_kind = sum(other["category_id"] == annotation["category_id"] for other in others)
    return not annotation.get("iscrowd") and of_its_kind == 1 and _LEAST_BOX_SHARE <= share <= _MOST_BOX_SHARE


def jittered(box: Box, size: tuple[int, int], rng: np.random.Generator) -> Box | None:
    """The box, moved and scaled inside of the image to an IoU of 0.2 to 0.5; None if chance finds none."""
    width, height = box[2] - box[0], box[3] - box[1]
    for _ in range(_JITTER_TRIES):
        dx, dy = rng.uniform(-0.6, 0.6, 2) * (width, height)
        new_width, new_height = rng.uniform(0.6, 1.6, 2) * (width, height)
        x, y = box[0] + dx + (width - new_width) / 2, box[1] + dy + (height - new_height) / 2
        moved = (max(0.0, x), max(0.0, y), min(float(size[0]), x + new_width), min(float(size[1]), y + new_height))
        if _JITTER_IOU[0] <= intersection_over_union(box, moved) <= _JITTER_IOU[1]:
            return moved
    return None


def counting(raw: Path, rng: np.random.Generator) -> Iterator[Example]:
    """How many are there? An open answer of 2 to 10; every count equally often, as far as there are images."""
    rows = [row for file in files(raw, ".parquet") for row in _pixmo_rows(file)]
    by_count = groups_of([row for row in rows if row[1] in COUNTS], lambda row: str(row[1]))
    queues = {count: shuffled(group, rng) for count, group in sorted(by_count.items())}
    while queues:
        count = sorted(queues)[rng.integers(len(queues))]
        row = next(queues[count], None)
        if row is None:
            del queues[count]
            continue
        label, number, image = _pixmo_image(raw, row)
        yield Example((image,), f"How many {label} are there in the image?", str(number), (row[3],), (image,))


def _pixmo_rows(file: Path) -> Iterator[tuple[str, int, bytes | None, str]]:
    """label, count, the image if the table holds it, name of the image."""
    table = pq.ParquetFile(file)
    wanted = [name for name in ("label", "count", "image", "image_sha256") if name in table.schema_arrow.names]
    if not {"label", "count"} <= set(wanted):
        raise DataError(f"{file}: no columns label and count; give PixMo-Count as it is published")
    for batch in table.iter_batches(columns=wanted):
        for number, row in enumerate(batch.to_pylist()):
            content = (row.get("image") or {}).get("bytes")
            yield str(row["label"]), int(row["count"]), content, str(row.get("image_sha256") or f"{file.name}/{number}")


def _pixmo_image(raw: Path, row: tuple[str, int, bytes | None, str]) -> tuple[str, int, Image.Image]:
    label, count, content, name = row
    if content is None:
        found = [raw / "images" / f"{name}{ending}" for ending in ("", *_IMAGES)]
        return label, count, read_image(next((file for file in found if file.is_file()), found[1]))
    with Image.open(io.BytesIO(content)) as image:
        return label, count, image.convert("RGB")
