"""Runs over seeds as one: the figures against numbers worked out by hand, and runs that must not be averaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shared.config import dump_config, parse_config
from tests.integration.helpers import training_tree
from trainer.cli import app
from trainer.evaluation.run import EVALUATION_FILE

NAMES = ("slot_cosine", "relative_norm")


def figure(value: float | None) -> dict[str, Any]:
    return {"value": value, "low": value, "high": value, "n": 4}


def reading(latents: float) -> dict[str, Any]:
    conditions = {"ceiling": 1.0, "latents": latents, "swapped": 0.2, "floor": 0.2}
    return {name: figure(value) for name, value in conditions.items()} | {
        "recovered_share": figure((latents - 0.2) / 0.8)
    }


def write_run(folder: Path, seed: int, latents: float = 0.8, verdict: str = "used", **changed: Any) -> Path:
    tree = training_tree(folder.parent / "toy", folder)
    tree["train"] |= {"seed": seed} | changed.get("train", {})
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(parse_config(tree, "test")))
    evaluation = {
        "checkpoint": "step-000002",
        "step": 2 + seed,  # the best step may be another one with each seed
        "split": "test",
        "images": changed.get("images", 500),
        "seed": seed,
        "anchors": {"A": {"seen_in_training": True, **reading(latents)}},
        "causal": {"A": {"verdict": verdict, "lost_share": {"swap_images": figure(latents)}, "tests": {}}},
        "geometry": {
            "figures": {name: figure(0.5) for name in NAMES[: changed.get("n_figures", 2)]},
            "slot_cosine": [[1.0]],
            "norms": {},
            "slots": {"A": {"utility": figure(1.5), "utility_alone": [figure(0.1)], "helpful_slots": 3 + seed}},
            "probes": None,
        },
        "transfer": {"D": {"least_squares on latents": {**reading(0.6), "outside_span": 0.01}}},
    }
    (folder / EVALUATION_FILE).write_text(json.dumps(evaluation))
    return folder


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["summarise", *map(str, arguments)], env={"COLUMNS": "200"})
    return result.exit_code, " ".join((result.output + str(result.exception or "")).split())


def test_mean_interval_and_verdicts(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "one", 0, 0.5, verdict="inert"),
        write_run(tmp_path / "two", 1, 0.6),
        write_run(tmp_path / "three", 2, 0.7, n_figures=1),
    ]
    code, printed = call(*runs, "--to", tmp_path / "new" / "summary.json")
    assert code == 0, printed
    stored = json.loads((tmp_path / "new" / "summary.json").read_text())
    figures = stored["figures"]
    half = 4.302652729911275 * 0.1 / 3**0.5  # Student's t(0.975, 2), s = 0.1
    expected = {"value": 0.6, "low": 0.6 - half, "high": 0.6 + half, "n": 3}
    assert figures["A: accuracy from latents"] == pytest.approx(expected)
    assert figures["A: share lost to swap images"] == pytest.approx(expected)
    assert figures["A: recovered share"]["value"] == pytest.approx(0.5)
    assert figures["A: helpful slots"]["value"] == 4
    assert figures["D: recovered share, least squares on latents"]["value"] == pytest.approx(0.5)
    assert figures["relative norm"] == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 2}  # the third run lacks it
    assert stored["verdicts"] == {"A": {"used": 2, "inert": 1}}
    assert [run["seed"] for run in stored["runs"]] == [0, 1, 2]
    assert "0.600 [0.352, 0.848]" in printed
    assert "used 2, inert 1" in printed


def test_one_run_has_no_interval(tmp_path: Path) -> None:
    code, printed = call(write_run(tmp_path / "one", 0), "--to", tmp_path / "summary.json")
    assert code == 0, printed
    stored = json.loads((tmp_path / "summary.json").read_text())["figures"]["A: accuracy from latents"]
    assert stored == {"value": 0.8, "low": None, "high": None, "n": 1}


@pytest.mark.parametrize(
    ("seed", "changed", "expected"),
    [
        (1, {"train": {"warmup_steps": 1}}, "two is not one with another seed: train.warmup_steps is 1, not "),
        (0, {}, "one, two: all of train.seed 0"),
        (1, {"images": 100}, "evaluation of two: images is 100, that of one 500"),
    ],
)
def test_runs_that_are_no_seeds_of_one_config(
    tmp_path: Path, seed: int, changed: dict[str, Any], expected: str
) -> None:
    code, printed = call(write_run(tmp_path / "one", 0), write_run(tmp_path / "two", seed, **changed))
    assert code != 0
    assert expected in printed


def test_a_run_that_was_not_evaluated(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "one", 0), write_run(tmp_path / "two", 1)]
    (runs[1] / EVALUATION_FILE).unlink()
    code, printed = call(*runs)
    assert code != 0
    assert f"measure with: python -m trainer evaluate {runs[1]}" in printed
