"""metrics.jsonl after interruptions: what was written again is there once, a cut line costs only itself."""

from __future__ import annotations

import contextlib
import json
import sys

import pytest

from shared.config import Config, parse_config
from shared.errors import ConfigError
from trainer.metrics import MetricsWriter, read_metrics


def make_config(run_dir, **logging: bool) -> Config:
    tree = {
        "run": {"dir": str(run_dir)},
        "generator": {"model": "m"},
        "anchors": [{"name": "A", "model": "m"}],
        "data": {"path": "unused"},
        "logging": {"tensorboard": False, **logging},
    }
    return parse_config(tree, "test")


def write(run_dir, first_step: int, stop: int, note: str, **logging: bool) -> None:
    writer = MetricsWriter(run_dir, make_config(run_dir, **logging), first_step)
    with contextlib.closing(writer):
        for step in range(first_step, stop):
            writer.write(step, {"loss": step / 10, "note": note})


def test_a_resumed_run_replaces_what_it_does_again(tmp_path):
    write(tmp_path, 0, 5, "first")
    write(tmp_path, 3, 6, "second")
    entries = read_metrics(tmp_path)
    assert [(entry["step"], entry["note"]) for entry in entries] == [
        (0, "first"), (1, "first"), (2, "first"), (3, "second"), (4, "second"), (5, "second"),
    ]  # fmt: skip
    assert entries[4]["loss"] == 0.4
    write(tmp_path, 0, 1, "from the start")
    assert [entry["note"] for entry in read_metrics(tmp_path)] == ["from the start"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_last_line_cut_by_a_crash(tmp_path):
    write(tmp_path, 0, 3, "first")
    file = tmp_path / "metrics.jsonl"
    text = file.read_text()
    file.write_text(text[: len(text) - 9])
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [0, 1]
    write(tmp_path, 2, 4, "second")
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 1, 2, 3]


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path) == []


def test_every_line_is_on_disk_at_once(tmp_path):
    """Someone who follows the run must not wait for a buffer to fill."""
    with contextlib.closing(MetricsWriter(tmp_path, make_config(tmp_path), 0)) as writer:
        writer.write(0, {"loss": 1.0})
        assert read_metrics(tmp_path) == [{"step": 0, "loss": 1.0}]


def test_tensorboard_gets_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, 0, 3, "words stay out", tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, round(event.value, 6)) for event in events.Scalars("loss")] == [(0, 0.0), (1, 0.1), (2, 0.2)]


def test_wandb_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb, or set it to false"):
        MetricsWriter(tmp_path, make_config(tmp_path, wandb=True), 0)
