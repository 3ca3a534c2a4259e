"""A run with a curriculum, a mixture and held-out questions: what it logs, what it may not see, and that it resumes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from shared.config import parse_config
from shared.run_folder import run_config
from tests.integration.helpers import training_tree
from trainer.data import HELD_OUT_QUESTIONS
from trainer.loop import train_run
from trainer.metrics import read_metrics

STEPS = 6


def tree(toy: Path, run_dir: Path) -> dict[str, Any]:
    data = {
        "path": str(toy / "data"),
        "questions_per_image": 4,
        "hold_out_question": True,
        "test_split": "train" + HELD_OUT_QUESTIONS,
        "curriculum": {"schedule": "linear", "steps": 5},
        "others": [{"source": "clevr", "path": str(toy / "data"), "train_split": "val", "weight": 0.5}],
    }
    return training_tree(toy, run_dir, data=data, train={"steps": STEPS, "checkpoint_every": 3})


def test_weights_rise_and_a_resumed_run_is_the_same(toy_folder: Path, tmp_path: Path) -> None:
    quiet, struck = tmp_path / "quiet", tmp_path / "struck"
    assert train_run(parse_config(tree(toy_folder, quiet), "test"), resume=False)
    entries = read_metrics(quiet)
    # Level 4 of 0 … 4: w = 4 x − 3, x = step / 5.
    assert [entry["weight/relate"] for entry in entries] == pytest.approx([0, 0, 0, 0, 0.2, 1])
    assert [entry["share/relate"] for entry in entries][:4] == [0] * 4
    for entry in entries:
        assert sum(value for name, value in entry.items() if name.startswith("share/")) == pytest.approx(1)

    shutil.copytree(quiet, struck)
    shutil.rmtree(struck / "checkpoints" / f"step-{STEPS:06d}")
    assert train_run(run_config(struck), resume=True)
    exact = [name for name in entries[-1] if name.split("/")[0] in ("loss", "nll", "share", "weight", "grad_norm")]
    assert len(exact) > 8
    assert [[entry.get(name) for name in exact] for entry in read_metrics(struck)] == [
        [entry.get(name) for name in exact] for entry in entries
    ]
