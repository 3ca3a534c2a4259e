"""Which of two images is like the first: in art style (ArtBench-10), in looks (NIGHTS); and relative reflectance.

ArtBench-10 (Liao et al. 2022), image folders: …/train/STYLE/*.jpg
NIGHTS (Fu et al. 2023): data.csv with ref_path, left_path, right_path, left_vote, right_vote, votes, split; the images
Multi-Illumination (Murmann et al. 2019): SCENE/dir_0_mip2.jpg … dir_24_mip2.jpg, one scene under 25 lights
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from shared.errors import DataError
from trainer.data.livr_tasks.drawing import Point, with_points
from trainer.data.livr_tasks.example import Example, multiple_choice, place_of_answer
from trainer.data.livr_tasks.raw import files, read_image, shuffled

_LEAST_VOTES = 6
"""Triplets that at least so many people agreed on, as the data set's authors train and test on."""

_SECOND_OR_THIRD = ("the second image", "the third image")
_DARKER, _SAME = 1.5, 1.1
"""Ratio of two points' reflectances from which one is darker, and up to which they are the same; between, neither."""
_PATCH_PX, _TRIES = 9, 200
_FLAT = 0.1
"""Most deviation of reflectance within a patch, relative to its mean: a point on an edge has no answer."""
_DARK, _BRIGHT = 8.0, 247.0


def art_style(raw: Path, rng: np.random.Generator) -> Iterator[Example]:
    """A painting and two others; which has the same style? Goes on until a style's paintings are used up."""
    styles: dict[str, list[Path]] = {}
    for file in files(raw, ".jpg", ".jpeg", ".png"):
        if "test" not in file.relative_to(raw).parts:
            styles.setdefault(file.parent.name, []).append(file)
    if len(styles) < 2:
        raise DataError(f"{raw}: fewer than two folders of styles; give ArtBench-10 as image folders")
    queues = {style: list(shuffled(paintings, rng)) for style, paintings in sorted(styles.items())}
    while len(enough := sorted(style for style, queue in queues.items() if len(queue) >= 2)) >= 2:
        style, other = (enough[i] for i in rng.permutation(len(enough))[:2])
        chosen = [queues[style].pop(), queues[style].pop(), queues[other].pop()]
        question = "Which painting has the same art style as the one in the first image?"
        yield _like_the_first(chosen, question, rng)


def visual_similarity(raw: Path, rng: np.random.Generator) -> Iterator[Example]:
    """Which of two variations do people find more similar to the reference?"""
    table = raw / "data.csv"
    try:
        with table.open(newline="", encoding="utf-8") as file:
            rows = [
                row for row in csv.DictReader(file) if row["split"] == "train" and int(row["votes"]) >= _LEAST_VOTES
            ]
    except FileNotFoundError as error:
        raise DataError(f"{table}: missing; give NIGHTS as it is published") from error
    except (KeyError, ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{table}: not the table of NIGHTS ({error}); copy the file again") from error
    for row in shuffled(rows, rng):
        sides = ("left", "right") if float(row["left_vote"]) > float(row["right_vote"]) else ("right", "left")
        chosen = [raw / row["ref_path"], *(raw / row[f"{side}_path"] for side in sides)]
        yield _like_the_first(chosen, "Which image is more similar to the first one?", rng)


def _like_the_first(chosen: list[Path], question: str, rng: np.random.Generator) -> Example:
    """chosen: the reference, the right image, the wrong one."""
    reference, right, wrong = (read_image(file) for file in chosen)
    place, answer = place_of_answer(2, rng)
    options = [wrong]
    options.insert(place, right)
    pictures = (reference, *options)
    sources = tuple(f"{file.parent.name}/{file.name}" for file in chosen)
    return Example(pictures, multiple_choice(question, _SECOND_OR_THIRD), answer, sources, pictures)


def relative_reflectance(raw: Path, rng: np.random.Generator) -> Iterator[Example]:
    """Two points of a scene; which surface is darker in itself, or are both the same? Each answer equally often.

    Reflectance is the median over all lights of a point's brightness relative to the picture's mean: light that
    falls unevenly on two points in one picture does not in most. The picture shown is that of one light. How the
    published task was labelled is not known; this is our choice.
    """
    scenes = sorted({file.parent for file in files(raw, ".jpg") if file.name.startswith("dir_")})
    wanted = 0
    while scenes:
        for scene in shuffled(scenes, rng):
            views = [read_image(file) for file in files(scene, ".jpg") if file.name.startswith("dir_")]
            found = _points_with(("A", "B", "same")[wanted % 3], views, rng)
            if found is None:
                continue
            wanted += 1
            shown = with_points(views[rng.integers(len(views))], found, "AB")
            question = "Think of the surfaces themselves, without light and shadow. Which marked point is darker?"
            choices = ["A is darker", "B is darker", "both are about the same"]
            answer = f"({'ABC'[(wanted - 1) % 3]})"
            yield Example((shown,), multiple_choice(question, choices), answer, (scene.name,), (views[0],))


def _points_with(answer: str, views: list[Image.Image], rng: np.random.Generator) -> tuple[Point, Point] | None:
    """Two points whose reflectances give this answer, never black or burnt out; None if chance finds none."""
    brightness_VHW = np.stack([np.asarray(view.convert("L"), dtype=np.float64) for view in views])
    relative_HW = np.median(brightness_VHW / brightness_VHW.mean(axis=(1, 2), keepdims=True), axis=0)
    usable_HW = (np.median(brightness_VHW, axis=0) > _DARK) & (brightness_VHW.max(axis=0) < _BRIGHT)
    height, width = relative_HW.shape
    half = _PATCH_PX // 2
    for _ in range(_TRIES):
        ys, xs = rng.integers(half, height - half, 2), rng.integers(half, width - half, 2)
        if np.hypot(ys[0] - ys[1], xs[0] - xs[1]) < 0.1 * max(height, width):
            continue
        patches = [np.s_[y - half : y + half + 1, x - half : x + half + 1] for y, x in zip(ys, xs, strict=True)]
        if not all(usable_HW[p].all() and relative_HW[p].std() <= _FLAT * relative_HW[p].mean() for p in patches):
            continue
        a, b = (float(relative_HW[patch].mean()) for patch in patches)
        given = "A" if b / a >= _DARKER else "B" if a / b >= _DARKER else "same" if max(a / b, b / a) <= _SAME else ""
        if given == answer:
            return (float(xs[0]), float(ys[0])), (float(xs[1]), float(ys[1]))
    return None
