"""Builds one task: raw data in, `TO/train.jsonl`, `TO/val.jsonl` and their images out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.errors import ConfigError, DataError
from trainer.data.livr_tasks.coco_tasks import counting, jigsaw, object_localization
from trainer.data.livr_tasks.correspondence import (
    functional_correspondence,
    semantic_correspondence,
    visual_correspondence,
)
from trainer.data.livr_tasks.example import Builder, Example
from trainer.data.livr_tasks.likeness import art_style, relative_reflectance, visual_similarity
from trainer.data.livr_tasks.perceptual_hash import SeenImages

TASKS: dict[str, Builder] = {
    "counting": counting,
    "jigsaw": jigsaw,
    "object_localization": object_localization,
    "visual_correspondence": visual_correspondence,
    "art_style": art_style,
    "semantic_correspondence": semantic_correspondence,
    "functional_correspondence": functional_correspondence,
    "relative_reflectance": relative_reflectance,
    "visual_similarity": visual_similarity,
}
_FRUITLESS = 10_000
"""Examples in a row that may be turned down before the raw data counts as used up."""


@dataclass(frozen=True, slots=True)
class BuildReport:
    """Records written by split, and how many were left out because an image is in the test set, or in another split."""

    written: dict[str, int]
    in_test_set: int
    in_other_split: int


def build_task(
    task: str,
    raw: Path,
    to: Path,
    sizes: dict[str, int],
    test_set: SeenImages,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> BuildReport:
    """Write the splits, the smallest first; no raw image is in two of them, none is in the test set.

    The folder must not hold these splits yet. Deterministic in the seed. Raises ConfigError for an unknown task or a
    folder in use, DataError for damaged raw data or too little of it.
    """
    if task not in TASKS:
        raise ConfigError(f"task {task!r} is not known; use one of {', '.join(TASKS)}")
    for split in sizes:
        if (to / f"{split}.jsonl").exists():
            raise ConfigError(f"{to / split}.jsonl: there already; choose another folder, or remove the file")
    examples = TASKS[task](raw, np.random.default_rng([seed, list(TASKS).index(task)]))
    owner: dict[str, str] = {}
    left_out = {"test": 0, "split": 0}
    written: dict[str, int] = {}
    total = sum(sizes.values())
    for split, size in sorted(sizes.items(), key=lambda item: item[1]):
        lines: list[str] = []
        turned_down = 0
        while len(lines) < size:
            example = next(examples, None)
            if example is None or turned_down >= _FRUITLESS:
                raise DataError(
                    f"{raw}: {len(lines)} examples of {task} for {split}, {size} were asked for; ask for fewer or "
                    "give more raw data"
                )
            reason = _reason_against(example, split, owner, test_set)
            if reason is not None:
                left_out[reason] += 1
                turned_down += 1
                continue
            turned_down = 0
            owner |= dict.fromkeys(example.sources, split)
            lines.append(_save(example, task, split, len(lines), to))
            if progress is not None:
                progress(sum(written.values()) + len(lines), total)
        partial = to / f"{split}.jsonl.partial"
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        partial.replace(to / f"{split}.jsonl")
        written[split] = len(lines)
    return BuildReport(written, left_out["test"], left_out["split"])


def _reason_against(example: Example, split: str, owner: dict[str, str], test_set: SeenImages) -> str | None:
    if any(owner.get(source, split) != split for source in example.sources):
        return "split"
    if any(image in test_set for image in example.originals):
        return "test"
    return None


def _save(example: Example, task: str, split: str, number: int, to: Path) -> str:
    names = []
    for i, picture in enumerate(example.pictures):
        name = f"images/{split}/{task}-{number:05d}-{i}.png"
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(to / name)
        names.append(name)
    question = {"question": example.question, "answer": example.answer, "kind": task}
    return json.dumps({"id": f"{task}-{split}-{number:05d}", "images": names, "questions": [question]})
