"""A few training steps from every source through two anchors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from shared.config import parse_config
from tests.data_samples import SAMPLES
from tests.integration.helpers import training_tree
from trainer.loop import train_run


@pytest.mark.parametrize("name", SAMPLES)
def test_training_from_every_source(name: str, toy_folder: Path, tmp_path: Path) -> None:
    tree = training_tree(toy_folder, tmp_path / "run", train={"steps": 3, "batch_images": 2, "checkpoint_every": 3})
    tree["data"] = {**SAMPLES[name](tmp_path / "data", ("train", "val")), "questions_per_image": 2}
    assert train_run(parse_config(tree, "test"), resume=False)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert all(math.isfinite(line[key]) and line[key] > 0 for key in ("loss", "nll/A", "nll/B", "grad_norm"))
    assert math.isfinite(lines[-1]["validation_nll"])
