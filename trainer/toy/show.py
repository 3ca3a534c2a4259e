"""Look at one scene of the toy world."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from trainer.toy.dataset import choose_questions
from trainer.toy.questions import all_questions
from trainer.toy.world import IMAGE_PX, render, sample_scene

_ENLARGE = 8


def show_scene(seed: int, to: Path, console: Console) -> None:
    """Write the scene as a PNG and print two questions of every kind."""
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    size = (IMAGE_PX * _ENLARGE, IMAGE_PX * _ENLARGE)
    render(scene, rng).resize(size, Image.Resampling.NEAREST).save(to)
    table = Table("kind", "question", "answer", title=f"scene {seed}, drawn to {to}")
    for question in choose_questions(all_questions(scene), defaultdict(Counter), rng, per_kind=2):
        table.add_row(question.kind, question.text, question.answer)
    console.print(table)
