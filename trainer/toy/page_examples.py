"""Writes the example images of the served page: `python -m trainer.toy.page_examples`."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.toy.questions import cell_name
from trainer.toy.world import ToyScene, render, sample_scene

PAGE = Path(__file__).parents[2] / "anchor_service/serving/page.html"
EXAMPLES = {
    14: "what color is the circle?",
    18: "how many squares are there?",
    11: "what shape is the blue thing?",
}
"""Seed of the scene, and a question about it."""
BEGIN, END = "<!-- examples, written by `make page-examples` -->\n", "<!-- end of examples -->"


def example(seed: int) -> tuple[ToyScene, Image.Image]:
    """The scene of a seed and its picture."""
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    return scene, render(scene, rng)


def write_examples(page: Path = PAGE) -> None:
    """Put the examples between the two marks of the page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    buttons = "".join(_button(seed, question) for seed, question in EXAMPLES.items())
    page.write_text(before + BEGIN + buttons + END + after, encoding="utf-8")


def _button(seed: int, question: str) -> str:
    scene, picture = example(seed)
    shapes = ", ".join(f"{o.color} {o.shape} {cell_name(o.row, o.column)}" for o in scene.objects)
    png = io.BytesIO()
    picture.save(png, "PNG", optimize=True)
    address = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    image = f'<img src="{address}" alt="Shapes: {shapes}">'
    return f'<li><button type="button" data-question="{html.escape(question)}">{image}</button></li>\n'


if __name__ == "__main__":
    write_examples()
