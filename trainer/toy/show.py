"""Look at one scene of the toy world, or at one example of a task."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from shared.errors import ConfigError
from trainer.toy.dataset import choose_questions
from trainer.toy.questions import all_questions
from trainer.toy.tasks import TASKS
from trainer.toy.tasks.pictures import draw
from trainer.toy.world import IMAGE_PX, render, sample_scene

_ENLARGE = 8
_GAP_PX = 8


def show_scene(seed: int, to: Path, console: Console) -> None:
    """Write the scene as a PNG and print two questions of every kind."""
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    _enlarged(render(scene, rng)).save(to)
    table = Table("kind", "question", "answer", title=f"scene {seed}, drawn to {to}")
    for question in choose_questions(all_questions(scene), defaultdict(Counter), rng, per_kind=2):
        table.add_row(question.kind, question.text, question.answer)
    console.print(table)


def show_task(task: str, seed: int, to: Path, console: Console) -> None:
    """Write the images of one example side by side as a PNG and print its question and answer.

    A hint stands last.
    """
    if task not in TASKS:
        raise ConfigError(f"--task: no toy task {task!r}; there are {', '.join(TASKS)}")
    rng = np.random.default_rng(seed)
    example = TASKS[task].make(rng, str(rng.choice(TASKS[task].answers)))
    hints = [] if example.hint is None else [example.hint.picture]
    images = [_enlarged(draw(picture, rng)) for picture in (*example.pictures, *hints)]
    width, height = images[0].size
    sheet = Image.new("RGB", (len(images) * (width + _GAP_PX) - _GAP_PX, height), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (number * (width + _GAP_PX), 0))
    sheet.save(to)
    table = Table("task", "question", "answer", title=f"example {seed}, drawn to {to}")
    table.add_row(task, example.question, example.answer)
    console.print(table)


def _enlarged(image: Image.Image) -> Image.Image:
    return image.resize((IMAGE_PX * _ENLARGE, IMAGE_PX * _ENLARGE), Image.Resampling.NEAREST)
