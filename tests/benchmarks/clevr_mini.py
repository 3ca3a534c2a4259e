"""The whole way on real CLEVR: two small VLMs from its training split, a generator for one of them, the headline table.

    make clevr-mini        three quarters of an hour on a CPU core; goes on where it was interrupted

Everything is kept in runs/clevr-mini; delete the folder to measure again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from shared.vlm import load_vlm
from tests.benchmarks.clevr_lessons import Lessons
from tests.benchmarks.clevr_models import COURSES, train_model
from tests.benchmarks.results import Result, record
from trainer.data.clevr import load_clevr
from trainer.data.records import Record
from trainer.evaluation.reading import CONDITIONS
from trainer.evaluation.statistics import ImageBootstrap
from trainer.toy.build import accuracy

COMMAND = "make clevr-mini"
CONFIG = "deploy/configs/clevr_mini.yaml"
DATA = Path("../shared/clevr-mini")
ROOT = Path("runs/clevr-mini")
_EXACT = "exact match; 95 % interval over images"
_TRAIN_IMAGES = 200
_PLAIN_EVERY_STEPS = 50
_ALL = "all kinds"


def trained_models(data: Path, console: Console) -> dict[str, float]:
    """CPU minutes of every model, trained unless it is there."""
    seconds_file = ROOT / "cpu_s.json"
    seconds: dict[str, float] = json.loads(seconds_file.read_text()) if seconds_file.is_file() else {}
    models = ROOT / "models"
    models.mkdir(parents=True, exist_ok=True)
    lessons = None
    with Progress(console=console, disable=not console.is_terminal) as bar:
        for course in COURSES:
            if course.name in seconds:
                continue
            lessons = lessons or Lessons(data)
            task = bar.add_task(f"model {course.name}", total=course.steps)
            seconds[course.name] = train_model(
                course, lessons, models, lambda step, loss, task=task: _show_step(bar, task, step, loss)
            )
            seconds_file.write_text(json.dumps(seconds))
    return {name: value / 60 for name, value in seconds.items()}


def _show_step(bar: Progress, task: TaskID, step: int, loss: float) -> None:
    """A bar in a terminal; a line now and then where output goes to a file."""
    bar.update(task, completed=step + 1)
    if bar.disable and (step + 1) % _PLAIN_EVERY_STEPS == 0:
        state = bar.tasks[task]
        bar.console.print(f"{state.description}: step {step + 1}/{state.total:g}, loss {loss:.4f}")


def evaluation(data: Path) -> dict[str, Any]:
    """evaluation.json of the generator's run, trained and evaluated unless that was done."""
    folder = ROOT / "run"
    if not (folder / "evaluation.json").is_file():
        arguments = ["--config", CONFIG, "--set", f"run.dir={folder}", "--set", f"data.path={data}"]
        if (folder / "metrics.jsonl").is_file():
            arguments = ["--resume", str(folder)]
        subprocess.run([sys.executable, "-m", "trainer", "train", *arguments], check=True)
    result: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return result


def row(figure: str, value: Mapping[str, Any], unit: str) -> Result:
    """A figure of evaluation.json."""
    return Result(f"CLEVR, {figure}", value["value"], unit, "–", None, value["low"], value["high"], value["n"], COMMAND)


def anchor_rows(name: str, anchor: Mapping[str, Any]) -> list[Result]:
    """The headline of one anchor, of all questions and per kind."""
    label = name if anchor["seen_in_training"] else f"{name} (unseen in training)"
    rows = []
    for kind, figures in [(_ALL, anchor), *anchor["kinds"].items()]:
        rows += [row(f"{label}: {condition}, {kind}", figures[condition], _EXACT) for condition in CONDITIONS]
        unit = "(latents − floor) / (ceiling − floor); 95 % interval over images"
        rows.append(row(f"{label}: recovered share, {kind}", figures["recovered_share"], unit))
    return rows


def prior_rows(train: Sequence[Record], test: Sequence[Record]) -> list[Result]:
    """The language prior: for each kind of question, always the commonest answer of the training split."""
    kinds = sorted({question.kind for record in test for question in record.questions})
    best = {kind: commonest(train, kind) for kind in kinds}
    asked = [(image, question) for image, record in enumerate(test) for question in record.questions]
    images_N = np.array([image for image, _ in asked])
    hits_N = np.array([question.answer == best[question.kind] for _, question in asked], dtype=float)
    kinds_N = np.array([question.kind for _, question in asked])
    bootstrap = ImageBootstrap(len(test), 1000, seed=0)
    rows = []
    for kind in (_ALL, *kinds):
        chosen_N = np.ones(len(asked), dtype=bool) if kind == _ALL else kinds_N == kind
        figure = bootstrap.mean(*bootstrap.per_image(images_N[chosen_N], hits_N[chosen_N]))
        what = "its commonest answer each" if kind == _ALL else f"always {best[kind]!r}"
        rows.append(row(f"language prior: {kind}", figure.to_json(), f"{_EXACT}; {what}"))
    return rows


def commonest(records: Sequence[Record], kind: str) -> str:
    """The commonest answer to questions of a kind."""
    answers = [question.answer for record in records for question in record.questions if question.kind == kind]
    return max(sorted(set(answers)), key=answers.count)


def training_image_rows(train: Sequence[Record]) -> list[Result]:
    """What the models reach on images that they were trained on."""
    rows = []
    for name in ("P", "Q"):
        reached = accuracy(load_vlm(str(ROOT / "models" / name)), train)["all"]
        n = sum(len(record.questions) for record in train)
        figure = f"CLEVR, {name}: ceiling on {len(train)} training images, {_ALL}"
        rows.append(Result(figure, reached, "exact match", "–", None, reached, reached, n, COMMAND))
    return rows


def main() -> None:
    """Train, measure, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="Folder of clevr-mini.")
    data = parser.parse_args().data
    if not data.is_dir():
        sys.exit(f"{data}: no such folder; name clevr-mini's with --data")
    torch.set_num_threads(1)
    console = Console()
    minutes = trained_models(data, console)
    anchors = evaluation(data)["anchors"]
    train, test = load_clevr(data, "train"), load_clevr(data, "val")
    rows = [result for name, anchor in anchors.items() for result in anchor_rows(name, anchor)]
    rows += [*prior_rows(train, test), *training_image_rows(train[:_TRAIN_IMAGES])]
    for name, value in minutes.items():
        figure = f"CLEVR, CPU time of training model {name}"
        rows.append(Result(figure, value, "min on one core", "–", None, value, value, 1, COMMAND))
    record(rows)


if __name__ == "__main__":
    main()
