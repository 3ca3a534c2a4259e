"""Correspondence of points between two images: visual (HPatches), semantic (SPair-71k), functional (FunKPoint).

The first image has one marked point, REF; the second has four, A to D, one of which is the same point.

HPatches (Balntas et al. 2017), hpatches-sequences-release: i_*/ and v_*/ with 1.ppm … 6.ppm and homographies H_1_2 …
SPair-71k (Min et al. 2019): PairAnnotation/trn/*.json with src_imname, trg_imname, src_kps, trg_kps, category, and
    JPEGImages/CATEGORY/*.jpg
FunKPoint (Lai et al. 2021): not verified against the release. Expected: annotations/*.json, each a list of
    {"image": "path.jpg", "task": "pour", "keypoints": [[x, y], …]}, a task's points in the same order for all images
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shared.errors import DataError
from trainer.data.livr_tasks.drawing import Point, with_points
from trainer.data.livr_tasks.example import LETTERS, Example, multiple_choice, place_of_answer
from trainer.data.livr_tasks.raw import files, folder, groups_of, read_image, read_json, shuffled

_MARGIN_SHARE = 0.05
_APART_SHARE = 0.1
"""Least distance between two marked points, as a share of the longer side, so that circles do not overlap."""
_TRIES = 50


def visual_correspondence(raw: Path, rng: np.random.Generator) -> Iterator[Example]:
    """Two images of a scene under another light or from another place; where is REF? Goes on without end."""
    sequences = sorted(path for path in raw.iterdir() if path.is_dir() and path.name[:2] in ("i_", "v_"))
    if not sequences:
        raise DataError(f"{raw}: no folder i_* or v_*; give hpatches-sequences-release")
    while True:
        for sequence in shuffled(sequences, rng):
            other = int(rng.integers(2, 7))
            first, second = read_image(sequence / "1.ppm"), read_image(sequence / f"{other}.ppm")
            homography = _homography(sequence / f"H_1_{other}")
            found = _matching_points(first, second, homography, rng)
            if found is not None:
                question = (
                    "REF marks a point of the first image. The second image shows the same scene from another place or "
                    "in another light. Which of its marked points is the same point?"
                )
                yield _pair(first, second, found[0], found[1], question, (sequence.name,), rng)


def _homography(file: Path) -> np.ndarray:
    try:
        matrix = np.loadtxt(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: no homography of 3 × 3 numbers ({error}); copy the file again") from error
    if matrix.shape != (3, 3):
        raise DataError(f"{file}: {matrix.shape} numbers instead of 3 × 3; copy the file again")
    return matrix


def _matching_points(
    first: Image.Image, second: Image.Image, homography: np.ndarray, rng: np.random.Generator
) -> tuple[Point, list[Point]] | None:
    """A point of the first image; in the second, itself and three others that lie in both. None if none is found."""
    kept: list[tuple[Point, Point]] = []
    for _ in range(_TRIES):
        point = _inside(first, rng)
        moved = homography @ (*point, 1.0)
        target: Point = (float(moved[0] / moved[2]), float(moved[1] / moved[2]))
        if _is_inside(second, target) and _are_apart([*(t for _, t in kept), target], second):
            kept.append((point, target))
        if len(kept) == len(LETTERS):
            return kept[0][0], [target for _, target in kept]
    return None


def semantic_correspondence(raw: Path, rng: np.random.Generator) -> Iterator[Example]:
    """Two objects of a category; which keypoint is the same part? The other options are its other keypoints."""
    annotations = files(folder(raw, "PairAnnotation") / "trn", ".json")
    for file in shuffled(annotations, rng):
        pair = read_json(file)
        name = f"{file.name}: not a pair annotation of SPair-71k"
        try:
            category = pair["category"]
            first, second = (
                read_image(raw / "JPEGImages" / category / pair[key]) for key in ("src_imname", "trg_imname")
            )
            sources, targets = pair["src_kps"], pair["trg_kps"]
        except KeyError as error:
            raise DataError(f"{name}: no {error}; copy the file again") from error
        chosen = _keypoints(targets, second, rng)
        if chosen is None:
            continue
        question = (
            f"REF marks a part of the {category} in the first image. Which marked point is the same part of the "
            f"{category} in the second image?"
        )
        reference = tuple(map(float, sources[chosen[0]]))
        options = [(float(targets[i][0]), float(targets[i][1])) for i in chosen]
        raw_images = (pair["src_imname"], pair["trg_imname"])
        yield _pair(first, second, (reference[0], reference[1]), options, question, raw_images, rng)


def functional_correspondence(raw: Path, rng: np.random.Generator) -> Iterator[Example]:
    """Two tools for one action; which point does the same job? The other options are the action's other points."""
    entries: list[dict[str, Any]] = [entry for file in files(raw / "annotations", ".json") for entry in read_json(file)]
    by_task = groups_of(entries, lambda entry: str(entry["task"]))
    pairs = [pair for group in by_task.values() for pair in itertools.permutations(group, 2)]
    for one, other in shuffled(pairs, rng):
        if len(one["keypoints"]) != len(other["keypoints"]):
            raise DataError(f"{raw}: {one['image']} and {other['image']} have not as many points for {one['task']}")
        first, second = (read_image(raw / "images" / entry["image"]) for entry in (one, other))
        chosen = _keypoints(other["keypoints"], second, rng)
        if chosen is None:
            continue
        question = (
            f'REF marks a point of the object in the first image. Think of the action "{one["task"]}": which marked '
            "point of the object in the second image does the same job?"
        )
        x, y = one["keypoints"][chosen[0]]
        options = [(float(other["keypoints"][i][0]), float(other["keypoints"][i][1])) for i in chosen]
        yield _pair(first, second, (float(x), float(y)), options, question, (one["image"], other["image"]), rng)


def _keypoints(points: Sequence[Sequence[float]], image: Image.Image, rng: np.random.Generator) -> list[int] | None:
    """Four keypoints far enough apart to be told apart, the right one first; None if there are fewer."""
    chosen: list[int] = []
    for i in rng.permutation(len(points)).tolist():
        if _are_apart([(points[j][0], points[j][1]) for j in (*chosen, i)], image):
            chosen.append(i)
        if len(chosen) == len(LETTERS):
            return chosen
    return None


def _pair(
    first: Image.Image,
    second: Image.Image,
    reference: Point,
    options: Sequence[Point],
    question: str,
    sources: tuple[str, ...],
    rng: np.random.Generator,
) -> Example:
    """options: the right one first."""
    place, answer = place_of_answer(len(options), rng)
    shown = list(options[1:])
    shown.insert(place, options[0])
    pictures = (with_points(first, [reference], ["REF"]), with_points(second, shown, LETTERS))
    choices = [f"Point {letter}" for letter in LETTERS]
    return Example(pictures, multiple_choice(question, choices), answer, sources, (first, second))


def _inside(image: Image.Image, rng: np.random.Generator) -> Point:
    low, high = _MARGIN_SHARE, 1 - _MARGIN_SHARE
    return float(rng.uniform(low, high) * image.width), float(rng.uniform(low, high) * image.height)


def _is_inside(image: Image.Image, point: Point) -> bool:
    shares = point[0] / image.width, point[1] / image.height
    return all(_MARGIN_SHARE <= share <= 1 - _MARGIN_SHARE for share in shares)


def _are_apart(points: Sequence[Point], image: Image.Image) -> bool:
    least = _APART_SHARE * max(image.size)
    return all(np.hypot(a[0] - b[0], a[1] - b[1]) >= least for a, b in itertools.combinations(points, 2))
