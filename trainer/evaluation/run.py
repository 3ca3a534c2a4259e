"""`evaluate RUN`: load the run's best checkpoint, start its anchors and the unseen ones, read, write, print."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from anchor_service.pool import AnchorPool
from shared.config import Config, load_config
from shared.errors import CheckpointError, ConfigError
from trainer.checkpoint import CheckpointStore
from trainer.data import load_records
from trainer.evaluation.reading import CONDITIONS, read_all, summarise
from trainer.generator import Generator
from trainer.image_features import ImageFeatures

EVALUATION_FILE = "evaluation.json"


def run_config(run_dir: Path) -> Config:
    """The resolved config of a run folder, with `run.dir` where the folder lies now."""
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir}: not a run folder (no config.yaml); give the folder that train wrote")
    return load_config(run_dir / "config.yaml", [f"run.dir={run_dir}"])


def evaluate_run(config: Config, console: Console) -> dict[str, Any]:
    """Measure all conditions for all anchors; writes RUN/evaluation.json and prints the tables."""
    checkpoint = CheckpointStore(config.run.dir, config.train.keep_checkpoints).best()
    if checkpoint is None:
        raise CheckpointError(f"{config.run.dir}: no checkpoint to evaluate; train first")
    records = load_records(config.data, config.data.test_split)[: config.evaluation.images]
    generator = Generator(config.generator, config.train.seed)
    generator.load_adapter(checkpoint.folder)
    shared_base = (generator.model, generator.adapter_off)
    with (
        AnchorPool.start(config, generator.handshake(), shared_base, config.all_anchors) as pool,
        contextlib.closing(ImageFeatures(generator, config.data.feature_cache)) as features,
        Progress(console=console, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("evaluate", total=len(records))
        tables = read_all(generator, features, pool, records, config, lambda done, _: bar.update(task, completed=done))
    unseen = {anchor.name for anchor in config.evaluation.unseen}
    result = {
        "checkpoint": checkpoint.folder.name,
        "step": checkpoint.step,
        "split": config.data.test_split,
        "images": len(records),
        "seed": config.train.seed,
        "anchors": {
            name: {"seen_in_training": name not in unseen, **summarise(table, len(records), config)}
            for name, table in tables.items()
        },
    }
    temporary = config.run.dir / f".{EVALUATION_FILE}.partial"
    temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    temporary.replace(config.run.dir / EVALUATION_FILE)
    print_tables(result, console)
    return result


def print_tables(result: dict[str, Any], console: Console) -> None:
    """Headline and per-kind accuracy, for people."""
    headline = Table(title=f"Exact match on {result['images']} unseen images (95 % interval)")
    for column in ("anchor", *CONDITIONS, "recovered share"):
        headline.add_column(column, justify="left" if column == "anchor" else "right")
    for name, figures in result["anchors"].items():
        label = name if figures["seen_in_training"] else f"{name} (unseen)"
        headline.add_row(label, *(_cell(figures[c]) for c in CONDITIONS), _cell(figures["recovered_share"]))
        if "held_out_kinds" in figures:
            held = figures["held_out_kinds"]
            row = (_cell(held[c]) for c in CONDITIONS)
            headline.add_row(f"{name}, held-out kinds", *row, _cell(held["recovered_share"]), style="dim")
    console.print(headline)

    by_kind = Table(title="Exact match by kind of question: latents (ceiling, floor)")
    by_kind.add_column("kind")
    for name in result["anchors"]:
        by_kind.add_column(name, justify="right")
    for kind in next(iter(result["anchors"].values()))["kinds"]:
        cells = []
        for figures in result["anchors"].values():
            f = figures["kinds"][kind]
            cells.append(f"{f['latents']['value']:.3f} ({f['ceiling']['value']:.3f}, {f['floor']['value']:.3f})")
        by_kind.add_row(kind, *cells)
    console.print(by_kind)


def _cell(figure: dict[str, float | None]) -> str:
    if figure["value"] is None:
        return "undefined"
    return f"{figure['value']:.3f}\n[{figure['low']:.3f}, {figure['high']:.3f}]"
