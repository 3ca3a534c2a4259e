"""The demo's own config, shorter: train, evaluate and read the results as a user's script would."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("demo")
    settings = [
        f"run.dir={folder / 'run'}",
        f"data.path={folder / 'data'}",
        "train.steps=250",
        "train.validate_every=0",
        "evaluation.images=100",
    ]
    arguments = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "trainer", "train", "--config", "deploy/configs/toy.yaml", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "recovered" in done.stdout
    return json.loads((folder / "run/evaluation.json").read_text())


@pytest.mark.parametrize(("name", "bar"), [("A", 0.70), ("B", 0.70), ("C", 0.65)])
def test_latents_carry_the_answer_after_a_short_training(evaluation: dict, name: str, bar: float) -> None:
    """Bars are far under the full demo's; without training the share is about 0."""
    figures = evaluation["anchors"][name]
    assert figures["ceiling"]["value"] >= 0.97
    assert figures["recovered_share"]["value"] >= bar
    for figure in ("ceiling", "floor", "latents", "swapped", "recovered_share"):
        assert set(figures[figure]) == {"value", "low", "high", "n"}
        assert figures[figure]["low"] <= figures[figure]["value"] <= figures[figure]["high"]


@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_latents_of_another_image_are_worth_no_more_than_none(evaluation: dict, name: str) -> None:
    figures = evaluation["anchors"][name]
    assert figures["swapped"]["value"] <= figures["floor"]["value"] + 0.05
