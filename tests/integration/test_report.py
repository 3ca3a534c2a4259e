"""The report reads what every suite of `evaluate` really writes."""

from __future__ import annotations

from pathlib import Path

from shared.config import parse_config
from tests.integration.test_suites import QUIET, config_of, write_pope
from trainer.data import load_records
from trainer.evaluation.run import evaluate_run
from trainer.loop import train_run
from trainer.methods import chosen_suites
from trainer.report.write import write_report


def test_a_run_with_every_suite_lacks_nothing(toy_folder: Path, tmp_path: Path) -> None:
    tree = config_of(toy_folder, tmp_path / "run").model_dump(mode="json")
    reader = {"name": "D", "model": "trainer/toy/models/D", "placement": "local", "tokens": 36}
    tree["evaluation"] |= {"benchmarks": {"pope": str(tmp_path / "pope")}, "transfer": [reader]}
    config = parse_config(tree, "test")
    records = load_records(config.data, config.data.test_split)
    write_pope(tmp_path / "pope", [Path(str(record.images[0])) for record in records])
    train_run(config, resume=False)
    evaluate_run(config, QUIET, chosen_suites(config, "all"))

    html = write_report([tmp_path / "run"], "mean").read_text()
    assert "<h2>Not in this report</h2>" not in html
    for title in ("reading", "causal-tests", "image-controls", "transfer", "geometry", "state-space", "attention"):
        assert f'<section id="{title}">' in html
    for title in ("training", "benchmarks", "reproduce"):
        assert f'<section id="{title}">' in html
