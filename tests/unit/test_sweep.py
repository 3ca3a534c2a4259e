"""Sweeps: what a grid means, and the table over seeds, against numbers worked out by hand."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest
import yaml
from PIL import Image
from rich.console import Console

from shared.config import dump_config
from shared.errors import ConfigError
from tests.integration.helpers import training_tree
from trainer.evaluation.headline import headline
from trainer.sweep.grid import Axis, parse_axis, trials
from trainer.sweep.results import Outcome, plot, rows_of, write_results
from trainer.sweep.run import most, resources


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    tree = training_tree(tmp_path / "toy", tmp_path / "unused")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "config.yaml"


def test_axes() -> None:
    assert parse_axis("K=4,9,16") == Axis("K", "generator.latents", (4, 9, 16))
    assert parse_axis("method=livr,sft") == Axis("method", "method", ("livr", "sft"))
    assert parse_axis("train.lr_lora=1.0e-4,0.001").values == (1e-4, 1e-3)
    assert parse_axis("data.held_out_kinds=[a,b],[]").values == (["a", "b"], [])


def test_every_point_with_every_seed(config_file: Path, tmp_path: Path) -> None:
    axes = [parse_axis("K=4,9"), parse_axis("data.held_out_kinds=[count],[]")]
    found = trials(config_file, ["loss.concept=0.5"], axes, 2, tmp_path / "to")
    assert [(t.config.generator.latents, t.config.data.held_out_kinds, t.seed) for t in found] == [
        (k, kinds, seed) for k in (4, 9) for kinds in (("count",), ()) for seed in (0, 1)
    ]
    assert all(t.config.train.seed == t.seed and t.config.loss.concept == 0.5 for t in found)
    folders = [t.config.run.dir for t in found]
    assert len(set(folders)) == 8
    assert all(folder.parent == tmp_path / "to" / "trials" for folder in folders)
    assert folders[0].name == "K=4-data.held_out_kinds=_count_-seed0"
    assert found[0].name == "K=4, data.held_out_kinds=[count]"
    assert [t.name for t in trials(config_file, [], [], 1, tmp_path)] == ["all defaults"]


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ("K", "--grid K: write it as field=value,value"),
        ("K=", "--grid K=: write it as field=value,value"),
        ("K=4,4", "a value stands there twice"),
        ("K=[4", "the values are not valid YAML"),
        ("train.stepz=3", "train.stepz: unknown key"),
        ("train.steps=0,5", "train.steps: input should be greater than or equal to 1"),
        ("method=livr,magic", "method: 'magic' is not known"),
        ("run.dir=a,b", "the sweep sets it itself"),
        ("train.seed=1,2", "the sweep sets it itself"),
    ],
)
def test_wrong_grids_are_refused_before_anything_starts(
    config_file: Path, tmp_path: Path, grid: str, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        trials(config_file, [], [parse_axis(grid)], 1, tmp_path)
    assert not (tmp_path / "trials").exists()


def test_a_folder_of_other_settings_or_of_two_points_is_refused(config_file: Path, tmp_path: Path) -> None:
    axes = [parse_axis("K=4")]
    (trial,) = trials(config_file, [], axes, 1, tmp_path)
    trial.config.run.dir.mkdir(parents=True)
    (trial.config.run.dir / "config.yaml").write_text(dump_config(trial.config))
    assert trials(config_file, [], axes, 1, tmp_path)[0].config == trial.config
    with pytest.raises(ConfigError, match="K=4-seed0: a run with other settings lies there; choose another --to"):
        trials(config_file, ["train.steps=7"], axes, 1, tmp_path)
    with pytest.raises(ConfigError, match="two points would share the folder"):
        trials(config_file, [], [parse_axis("data.path=a/b,a b")], 1, tmp_path)


def outcome(k: int, seed: int, accuracy: float | None, error: str = "") -> Outcome:
    figures = None if accuracy is None else {"accuracy": accuracy, "attention to latents": 0.1}
    return Outcome({"K": k, "method": "livr"}, seed, Path(f"{k}-{seed}"), figures, error)


OUTCOMES = [
    outcome(4, 0, 0.5),
    outcome(4, 1, 0.7),
    outcome(4, 2, 0.6),
    outcome(9, 0, 0.8),
    outcome(9, 1, None, "out of memory"),
    outcome(9, 2, None),
]


def test_room_is_planned_for_the_hungriest_trial(config_file: Path, tmp_path: Path) -> None:
    axes = [parse_axis("anchors.0.placement=local,ray"), parse_axis("anchors.0.cpus=1,2")]
    needs = [resources(trial, 1.5) for trial in trials(config_file, [], axes, 1, tmp_path / "to")]
    driver_and_b = needs[0]["CPU"]
    assert [need["CPU"] - driver_and_b for need in needs] == [0, 0, 1, 2]
    assert most(needs) == {"CPU": driver_and_b + 2}


def test_means_and_intervals_over_seeds() -> None:
    four, nine = rows_of(OUTCOMES)
    assert (four.label, four.seeds, four.failed) == ("K=4, method=livr", 3, ())
    figure = four.figures["accuracy"]
    half = 4.302652729911275 * 0.1 / math.sqrt(3)  # Student's t(0.975, 2), s = 0.1
    assert (figure.value, figure.low, figure.high) == pytest.approx((0.6, 0.6 - half, 0.6 + half))
    assert (nine.seeds, nine.failed, nine.figures["accuracy"].value) == (1, (1, 2), 0.8)
    assert math.isnan(nine.figures["accuracy"].low)


def test_files_and_table(tmp_path: Path) -> None:
    axes = [parse_axis("K=4,9"), parse_axis("method=livr")]
    printed = io.StringIO()
    write_results(OUTCOMES, axes, tmp_path, Console(file=printed, width=120))
    assert "0.600" in printed.getvalue()
    assert "1, 2 failed" in printed.getvalue()
    assert "failed: 9-1: …out of memory" in printed.getvalue()
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["points"][1]["failed_seeds"] == [1, 2]
    assert stored["points"][1]["figures"]["accuracy"] == {"value": 0.8, "low": None, "high": None, "n": 1}
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["accuracy"] for row in rows] == ["0.5", "0.7", "0.6", "0.8", "", ""]
    assert rows[4]["error"] == "out of memory"
    assert Image.open(tmp_path / "results.png").width > 500


def test_words_on_all_axes_make_bars() -> None:
    axes = [parse_axis("method=livr,sft")]
    rows = rows_of([Outcome({"method": m}, s, Path("x"), {"accuracy": 0.5}) for m in ("livr", "sft") for s in (0, 1)])
    assert Image.open(io.BytesIO(plot(rows, axes, "accuracy"))).height > 200


def test_headline_of_both_kinds_of_evaluation() -> None:
    def value(v: float | None) -> dict[str, float | None]:
        return {"value": v, "low": v, "high": v, "n": 3}

    conditions = {"ceiling": value(1.0), "latents": value(0.8), "swapped": value(0.3), "floor": value(0.2)}
    anchors = {
        "A": {"recovered_share": value(0.75), **conditions, "held_out_kinds": {"recovered_share": value(0.5)}},
        "B": {"recovered_share": value(None), **conditions, "latents": value(0.1)},
    }
    figures = headline({"anchors": anchors})
    assert figures == {
        "A: recovered share": 0.75,
        "A: accuracy from latents": 0.8,
        "B: accuracy from latents": 0.1,
        "A: accuracy, ceiling": 1.0,
        "A: accuracy, swapped": 0.3,
        "A: accuracy, floor": 0.2,
        "A: recovered share, held-out kinds": 0.5,
        "B: accuracy, ceiling": 1.0,
        "B: accuracy, swapped": 0.3,
        "B: accuracy, floor": 0.2,
    }
    assert list(figures)[:2] == ["A: recovered share", "A: accuracy from latents"]  # what a sweep prints
    usage = {
        "conditions": {"normal": {"accuracy": value(0.7)}, "latents_removed": {"accuracy": value(0.4)}},
        "attention_to_latents": value(0.2),
    }
    assert headline({"usage": usage}) == {
        "accuracy": 0.7,
        "accuracy, latents removed": 0.4,
        "attention to latents": 0.2,
    }
