"""Writes toy scenes to disk in the CLEVR v1.0 folder format, with answers balanced within each question."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import DataError
from trainer.toy.questions import KINDS, ToyQuestion, all_questions
from trainer.toy.world import ToyScene, render, sample_scene

SPLIT_SIZES = {"train": 4000, "val": 200, "test": 500}
_LICENSE = "CC0 1.0"

Progress = Callable[[int, int], None]


def ensure_toy_data(
    root: Path,
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
    questions_per_kind: int = 2,
    progress: Progress | None = None,
) -> None:
    """Write the toy data set to `root` unless it is there already with the same sizes and seed.

    Written beside `root` and renamed, so a killed build leaves nothing that looks complete. `progress` is called
    with (images done, images in all). Raises DataError rather than replace a folder that it did not write.
    """
    wanted: dict[str, Any] = {
        "sizes": dict(sizes or SPLIT_SIZES),
        "seed": seed,
        "questions_per_kind": questions_per_kind,
    }

    def write(folder: Path) -> None:
        done, total = 0, sum(wanted["sizes"].values())
        for number, (split, n_images) in enumerate(wanted["sizes"].items()):
            rng = np.random.default_rng([seed, number])
            for _ in write_split(folder, split, n_images, rng, questions_per_kind):
                done += 1
                if progress is not None:
                    progress(done, total)

    ensure_folder(root, "toy.json", wanted, write)


def ensure_folder(root: Path, stamp_name: str, wanted: Mapping[str, Any], write: Callable[[Path], None]) -> None:
    """Have `write` fill `root`, unless a file of this name in it says that it holds what is wanted.

    Raises DataError rather than replace a folder that has no such file.
    """
    stamp = root / stamp_name
    if stamp.is_file() and json.loads(stamp.read_text()) == wanted:
        return
    if root.exists() and not stamp.is_file():
        raise DataError(f"{root}: exists and is no toy data set; choose another folder, or set data.source: clevr")
    partial = root.with_name(f".{root.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    (partial / stamp_name).write_text(json.dumps(wanted, indent=2) + "\n")
    if root.exists():
        shutil.rmtree(root)
    partial.rename(root)


def write_split(root: Path, split: str, n_images: int, rng: np.random.Generator, questions_per_kind: int) -> Any:
    """Write one split; yields after every image."""
    for name in (f"images/{split}", "questions", "scenes"):
        (root / name).mkdir(parents=True, exist_ok=True)
    asked: dict[str, Counter[str]] = defaultdict(Counter)
    scenes: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    for index in range(n_images):
        scene = sample_scene(rng)
        filename = f"CLEVR_{split}_{index:06d}.png"
        render(scene, rng).save(root / "images" / split / filename, compress_level=1)
        place = {"split": split, "image_filename": filename, "image_index": index}
        scenes.append({**place, **_scene_entry(scene)})
        for question in choose_questions(all_questions(scene), asked, rng, questions_per_kind):
            questions.append({**place, **_question_entry(question), "question_index": len(questions)})
        yield index
    info = {"version": "1.0", "split": split, "license": _LICENSE}
    for name, entries in (("questions", questions), ("scenes", scenes)):
        (root / name / f"CLEVR_{split}_{name}.json").write_text(json.dumps({"info": info, name: entries}))


def choose_questions(
    candidates: list[ToyQuestion], asked: dict[str, Counter[str]], rng: np.random.Generator, per_kind: int
) -> list[ToyQuestion]:
    """`per_kind` questions of each kind, those whose text-and-answer pair was asked least so far.

    Balancing within the text makes an answer given without seeing the image a guess: the floor is honest.
    """
    chosen = []
    for kind in KINDS:
        of_kind = [c for c in candidates if c.kind == kind]
        for _ in range(min(per_kind, len(of_kind))):
            order = rng.permutation(len(of_kind))
            best = min(order, key=lambda i: asked[of_kind[i].text][of_kind[i].answer])
            question = of_kind.pop(int(best))
            asked[question.text][question.answer] += 1
            chosen.append(question)
    return chosen


def _scene_entry(scene: ToyScene) -> dict[str, Any]:
    objects = [
        {
            "shape": o.shape,
            "color": o.color,
            "size": "small" if o.radius_px < 5.1 else "large",
            "material": "rubber",
            "3d_coords": [float(o.column), float(-o.row), 0.0],
            "rotation": 0.0,
            "pixel_coords": [round(o.x_px, 2), round(o.y_px, 2), 0.0],
            "cell": [o.row, o.column],
        }
        for o in scene.objects
    ]
    directions = {"left": [-1, 0, 0], "right": [1, 0, 0], "behind": [0, 1, 0], "front": [0, -1, 0]}
    return {"objects": objects, "directions": directions, "relationships": _relationships(scene)}


def _relationships(scene: ToyScene) -> dict[str, list[list[int]]]:
    """CLEVR's scene graph: for each object the indices of those that stand so to it (behind is up)."""
    tests: dict[str, Callable[[Any, Any], bool]] = {
        "left": lambda o, other: o.column < other.column,
        "right": lambda o, other: o.column > other.column,
        "behind": lambda o, other: o.row < other.row,
        "front": lambda o, other: o.row > other.row,
    }
    objects = scene.objects
    return {
        name: [[i for i, o in enumerate(objects) if stands(o, other)] for other in objects]
        for name, stands in tests.items()
    }


def _question_entry(question: ToyQuestion) -> dict[str, Any]:
    program = [{"function": f, "inputs": i, "value_inputs": v} for f, i, v in question.program]
    return {
        "question": question.text,
        "answer": question.answer,
        "program": program,
        "question_kind": question.kind,
        "template_filename": f"{question.template}.json",
        "question_family_index": KINDS.index(question.kind),
    }
