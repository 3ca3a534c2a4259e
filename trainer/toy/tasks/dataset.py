"""Writes toy tasks as a data set of one JSON object per line, with answers dealt evenly and no scene in two splits."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import ConfigError
from trainer.toy.dataset import ensure_folder
from trainer.toy.tasks import TASKS, Example, Task
from trainer.toy.tasks.pictures import Picture, draw

EVALUATION_SIZES = {"val": 100, "test": 500}
"""Records of each task beside those for training."""
_COARSE_PX = 4


def ensure_tasks(
    root: Path,
    tasks: Sequence[str],
    sizes: Mapping[str, int],
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `sizes[split]` records of each task in each split, unless they are there.

    Deterministic in the seed; what a task's records are does not depend on the other tasks. `progress` is called with
    (records done, records in all). Raises ConfigError for an unknown task, DataError for a folder of something else.
    """
    if unknown := set(tasks) - set(TASKS):
        raise ConfigError(f"--tasks: no toy task {sorted(unknown)[0]!r}; there are {', '.join(TASKS)}")
    wanted: dict[str, Any] = {"tasks": list(tasks), "sizes": dict(sizes), "seed": seed}

    def write(folder: Path) -> None:
        done, total = 0, len(tasks) * sum(sizes.values())
        lines: dict[str, list[str]] = {split: [] for split in sizes}
        for split in sizes:
            (folder / "images" / split).mkdir(parents=True)
        for name in tasks:
            rng = np.random.default_rng([seed, list(TASKS).index(name)])
            written = Counter[str]()
            for split, example in examples(TASKS[name], sizes, rng):
                lines[split].append(_write_record(folder, split, name, written[split], example, rng))
                written[split] += 1
                done += 1
                if progress is not None:
                    progress(done, total)
        for split, records in lines.items():
            (folder / f"{split}.jsonl").write_text("".join(records), encoding="utf-8")

    ensure_folder(root, "tasks.json", wanted, write)


def examples(task: Task, sizes: Mapping[str, int], rng: np.random.Generator) -> Iterator[tuple[str, Example]]:
    """Split after split, every answer as often as any other; none of its scenes is in an earlier split."""
    earlier: set[object] = set()
    for split, size in sizes.items():
        here: set[object] = set()
        for answer in rng.permutation(np.arange(size) % len(task.answers)):
            while True:
                example = task.make(rng, task.answers[int(answer)])
                keys = {scene_key(picture) for picture in example.pictures}
                if not keys & earlier:
                    break
            here |= keys
            yield split, example
        earlier |= here


def scene_key(picture: Picture) -> object:
    """What a picture shows, coarsely: two with the same key look alike but for jitter, light and noise."""
    places = [
        (t.shape, t.color, t.turns, round(t.x_px / _COARSE_PX), round(t.y_px / _COARSE_PX), round(t.reflectance, 1))
        for t in picture.things
    ]
    return picture.style, tuple(sorted(places))


def _write_record(folder: Path, split: str, task: str, index: int, example: Example, rng: np.random.Generator) -> str:
    images = []
    for number, picture in enumerate(example.pictures, start=1):
        name = f"images/{split}/{task}_{index:05d}_{number}.png"
        draw(picture, rng).save(folder / name, compress_level=1)
        images.append(name)
    question = {"question": example.question, "answer": example.answer, "kind": task}
    record: dict[str, Any] = {"id": f"{task}/{index:05d}", "images": images, "questions": [question]}
    if example.hint is not None:
        name = f"images/{split}/{task}_{index:05d}_hint.png"
        draw(example.hint.picture, rng).save(folder / name, compress_level=1)
        record["auxiliary"] = {"image": name, "description": example.hint.description}
    return json.dumps(record) + "\n"
