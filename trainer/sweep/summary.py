"""Runs that differ in their seed alone, as one: mean of every headline figure over seeds with Student's interval."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shared.config import Config
from shared.errors import ConfigError, DataError
from trainer.evaluation.headline import headline
from trainer.report.results import RunResults, load_results
from trainer.sweep.results import Outcome, Row, cell, rows_of, write_text

_OWN = ("run.dir", "train.seed")
"""Settings in which the runs may differ."""


def summarise_runs(run_dirs: Sequence[Path], console: Console, to: Path | None = None) -> Row:
    """Print the table; write it to the JSON file `to`.

    A figure that some of the runs lack is over the others; the table says how many. Raises ConfigError for runs of
    different configs or equal seeds, DataError for evaluations that are absent, damaged or not of the same images.
    """
    runs = load_results(run_dirs)
    _check(runs)
    outcomes = [
        Outcome({}, run.config.train.seed, folder, headline(run.evaluation.model_dump(exclude_unset=True)))
        for run, folder in zip(runs, run_dirs, strict=True)
    ]
    (row,) = rows_of(outcomes)
    verdicts = _verdicts(runs)
    _print(row, verdicts, console)
    if to is not None:
        to.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "runs": [{"folder": str(o.folder), "seed": o.seed, "figures": o.figures} for o in outcomes],
            "figures": {name: figure.to_json() for name, figure in row.figures.items()},
            "verdicts": verdicts,
        }
        write_text(to, json.dumps(content, indent=2) + "\n")
        console.print(f"summary: {to}", highlight=False, soft_wrap=True)
    return row


def _check(runs: Sequence[RunResults]) -> None:
    """What must be equal is, and what must differ does."""
    first, *others = runs
    for other in others:
        if different := _differences(first.config, other.config):
            raise ConfigError(
                f"{other.label} is not {first.label} with another seed: {'; '.join(different)}; "
                "summarise runs of one config"
            )
        for name in ("split", "images", "norm_calibration"):
            ours, theirs = getattr(first.evaluation, name), getattr(other.evaluation, name)
            if ours != theirs:
                raise DataError(
                    f"evaluation of {other.label}: {name} is {theirs}, that of {first.label} {ours}; "
                    "evaluate both in the same way"
                )
    for seed, n in Counter(run.config.train.seed for run in runs).items():
        if n > 1:
            same = ", ".join(run.label for run in runs if run.config.train.seed == seed)
            raise ConfigError(f"{same}: all of train.seed {seed}, which is one run measured twice; give each seed once")


def _differences(config: Config, other: Config) -> list[str]:
    """Settings in which two configs differ, but for those that are a run's own."""
    ours, theirs = (dict(_settings(c.model_dump(mode="json"))) for c in (config, other))
    names = [name for name in {**ours, **theirs} if name not in _OWN and ours.get(name) != theirs.get(name)]
    return [f"{name} is {theirs.get(name)}, not {ours.get(name)}" for name in names]


def _settings(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of the leaves, as `--set` takes them."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if not children:
        yield name, value
        return
    for key, child in children:
        yield from _settings(child, f"{name}.{key}" if name else str(key))


def _verdicts(runs: Sequence[RunResults]) -> dict[str, dict[str, int]]:
    """By anchor, how many runs have each verdict."""
    counts: dict[str, Counter[str]] = {}
    for run in runs:
        for anchor, causal in run.evaluation.causal.items():
            counts.setdefault(anchor, Counter())[causal.verdict] += 1
    return {anchor: dict(of_anchor.most_common()) for anchor, of_anchor in counts.items()}


def _print(row: Row, verdicts: dict[str, dict[str, int]], console: Console) -> None:
    table = Table("figure", title=f"Mean over {row.seeds} seeds (95 % interval)")
    table.add_column("mean", justify="right")
    table.add_column("runs", justify="right")
    for name, figure in row.figures.items():
        table.add_row(name, cell(figure), str(figure.n))
    for anchor, counts in verdicts.items():
        found = ", ".join(f"{verdict} {n}" for verdict, n in counts.items())
        table.add_row(f"{anchor}: verdict", found, str(sum(counts.values())))
    console.print(table)
