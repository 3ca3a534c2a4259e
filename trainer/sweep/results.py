"""One table over all runs of a sweep: mean over seeds with Student's interval, failures beside it; a plot; files."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.evaluation.statistics import Figure, over_seeds
from trainer.report.drawing import Triple, bars, curves, draw
from trainer.sweep.grid import Axis

_SHOWN_FIGURES = 4


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: its point on the grid, its figures by name, or why it has none (failed, or not run yet)."""

    point: Mapping[str, Any]
    seed: int
    folder: Path
    figures: Mapping[str, float] | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One point of the grid over its seeds."""

    point: Mapping[str, Any]
    figures: dict[str, Figure]
    seeds: int
    failed: tuple[int, ...]

    @property
    def label(self) -> str:
        """The point in words."""
        return ", ".join(f"{name}={value}" for name, value in self.point.items()) or "all defaults"


def rows_of(outcomes: Sequence[Outcome]) -> list[Row]:
    """Points in the order of the grid."""
    points: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        points.setdefault(json.dumps(dict(outcome.point), default=str), []).append(outcome)
    rows = []
    for group in points.values():
        finished = [outcome.figures for outcome in group if outcome.figures is not None]
        names = dict.fromkeys(name for figures in finished for name in figures)
        summary = {name: over_seeds([f[name] for f in finished if name in f]) for name in names}
        failed = tuple(outcome.seed for outcome in group if outcome.figures is None)
        rows.append(Row(group[0].point, summary, len(finished), failed))
    return rows


def write_results(outcomes: Sequence[Outcome], axes: Sequence[Axis], to: Path, console: Console) -> None:
    """Print the table; write results.json, results.csv and results.png into the sweep's folder."""
    rows = rows_of(outcomes)
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    _print(rows, names, axes, outcomes, console)
    to.mkdir(parents=True, exist_ok=True)
    write_text(to / "results.json", json.dumps(_as_json(rows, outcomes), indent=2) + "\n")
    with (to / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*(axis.name for axis in axes), "seed", "run", *names, "error"])
        for outcome in outcomes:
            values = ["" if outcome.figures is None else outcome.figures.get(name, "") for name in names]
            writer.writerow([*outcome.point.values(), outcome.seed, outcome.folder, *values, outcome.error])
    if names and any(row.figures for row in rows):
        (to / "results.png").write_bytes(plot(rows, axes, names[0]))
    console.print(f"results: {to / 'results.json'}, results.csv, results.png", highlight=False, soft_wrap=True)


def plot(rows: Sequence[Row], axes: Sequence[Axis], name: str) -> bytes:
    """A figure over the first axis whose values are numbers, a line for each value of the others; else bars."""
    numeric = next(
        (a.name for a in axes if all(isinstance(v, int | float) for v in a.values) and len(a.values) > 1), None
    )
    shown = [row for row in rows if name in row.figures]
    if numeric is None:
        series = {name: {row.label: _triple(row.figures[name]) for row in shown}}
        ends = [end for triple in series[name].values() for end in triple]
        span = (min([*ends, 0.0]) - 0.02, max(ends) + 0.02)
        return draw(lambda theme: bars(theme, series, name, span))[0]
    lines: dict[str, dict[float, Triple]] = {}
    for row in shown:
        others = ", ".join(f"{axis}={value}" for axis, value in row.point.items() if axis != numeric) or name
        lines.setdefault(others, {})[float(row.point[numeric])] = _triple(row.figures[name])
    return draw(lambda theme: curves(theme, lines, str(numeric), name))[0]


def _triple(figure: Figure) -> Triple:
    has_interval = figure.n > 1
    return (figure.value, figure.low, figure.high) if has_interval else (figure.value, figure.value, figure.value)


def _print(
    rows: Sequence[Row], names: Sequence[str], axes: Sequence[Axis], outcomes: Sequence[Outcome], console: Console
) -> None:
    table = Table(title="Mean over seeds (95 % interval)")
    for axis in axes:
        table.add_column(axis.name)
    for column in (*names[:_SHOWN_FIGURES], "seeds"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [cell(row.figures.get(name), "\n") for name in names[:_SHOWN_FIGURES]]
        seeds = f"{row.seeds}" + (f", {len(row.failed)} failed" if row.failed else "")
        table.add_row(*map(str, row.point.values()), *cells, seeds)
    console.print(table)
    for outcome in outcomes:
        if outcome.error:
            console.print(f"failed: {outcome.folder}: …{outcome.error}", style="red", highlight=False, markup=False)


def cell(figure: Figure | None, between: str = " ") -> str:
    """A figure with its interval as a table shows it."""
    if figure is None:
        return "–"
    return f"{figure.value:.3f}" + (f"{between}[{figure.low:.3f}, {figure.high:.3f}]" if figure.n > 1 else "")


def _as_json(rows: Sequence[Row], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "points": [
            {
                "point": dict(row.point),
                "seeds": row.seeds,
                "failed_seeds": list(row.failed),
                "figures": {name: figure.to_json() for name, figure in row.figures.items()},
            }
            for row in rows
        ],
        "runs": [
            {
                "point": dict(outcome.point),
                "seed": outcome.seed,
                "folder": str(outcome.folder),
                "figures": None if outcome.figures is None else dict(outcome.figures),
                "error": outcome.error,
            }
            for outcome in outcomes
        ],
    }


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
