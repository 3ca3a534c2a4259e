"""Fifty training steps from every source through two anchors."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest

from shared.config import parse_config
from shared.errors import DataError
from tests.data_samples import SAMPLES, jsonl
from tests.integration.helpers import training_tree
from trainer.loop import train_run

STEPS = 50


@pytest.mark.parametrize("name", SAMPLES)
def test_training_from_every_source(name: str, toy_folder: Path, tmp_path: Path) -> None:
    tree = training_tree(
        toy_folder, tmp_path / "run", train={"steps": STEPS, "batch_images": 2, "checkpoint_every": STEPS}
    )
    tree["data"] = {**SAMPLES[name](tmp_path / "data", ("train", "val")), "questions_per_image": 2}
    assert train_run(parse_config(tree, "test"), resume=False)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == STEPS
    for line in lines:
        assert all(math.isfinite(line[key]) and line[key] > 0 for key in ("loss", "nll/A", "nll/B", "grad_norm"))
    assert math.isfinite(lines[-1]["validation_loss"])


def test_images_that_cannot_be_decoded_are_named_or_skipped_and_counted(
    toy_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Their headers are whole, so only decoding finds out, in the loader's thread."""
    fields = jsonl(tmp_path / "data", ("train", "val"))
    damaged = tmp_path / "data/pictures/2.png"
    damaged.write_bytes(damaged.read_bytes()[:120])
    train = {"steps": 3, "batch_images": 6, "checkpoint_every": 3, "validate_images": 2}
    tree = training_tree(toy_folder, tmp_path / "run", train=train)
    tree["data"] = {**fields, "questions_per_image": 2}
    with pytest.raises(DataError, match=r"2\.png: image of record train/r2 cannot be read \(.*data\.on_error: skip"):
        train_run(parse_config(tree, "test"), resume=False)
    tree["data"] |= {"on_error": "skip"}
    tree["run"]["dir"] = str(tmp_path / "skipping")
    with caplog.at_level(logging.WARNING):
        assert train_run(parse_config(tree, "test"), resume=False)
    assert caplog.text.count("skipped: ") == 4  # before training, and once in each epoch
