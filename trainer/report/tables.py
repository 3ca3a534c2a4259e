"""Tables of the report: the same rows for all runs, one block of columns for each run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.evaluation.reading import CONDITIONS
from trainer.evaluation.verdict import VERDICT_TESTS
from trainer.report.page import Cell, Table
from trainer.report.results import Condition, Figure, Figures, Reading, RunResults, Scores

_ABSENT = Cell("–")
_HEADLINE_COLUMNS = [*CONDITIONS, "recovered share", "questions"]
_READ_FROM: tuple[Condition, ...] = ("latents", "ceiling")
_BENCHMARK_COLUMNS = [*_READ_FROM, "chance"]
_SWAP_COLUMNS = {
    "accuracy": "accuracy",
    "delta_accuracy": "Δ accuracy",
    "delta_nll": "Δ NLL",
    "flip_share": "flips",
    "recovered_share": "recovered share",
}

_USAGE_COLUMNS = {name: label for name, label in _SWAP_COLUMNS.items() if name != "recovered_share"}


def cell(figure: Figure | float) -> Cell:
    """A value, with its interval if it has one."""
    if isinstance(figure, float):
        return Cell(_number(figure))
    if figure.value is None:
        return Cell("undefined")
    if figure.low is None or figure.high is None:
        return Cell(_number(figure.value))
    return Cell(_number(figure.value), f"[{_number(figure.low)}, {_number(figure.high)}]")


def headline(runs: Sequence[RunResults]) -> Table:
    """Exact match under the four conditions and the recovered share; held-out kinds in lines of their own."""

    def rows(run: RunResults) -> dict[str, list[Cell]]:
        cells = {}
        for name, reading in run.evaluation.anchors.items():
            label = name if reading.seen_in_training else f"{name} (unseen)"
            cells[label] = _headline_cells(reading)
            if reading.held_out_kinds is not None:
                cells[f"{label}, held-out kinds"] = _headline_cells(reading.held_out_kinds)
        return cells

    return _table("Exact match, 95 % intervals over images", _HEADLINE_COLUMNS, runs, rows)


def recovered_shares(runs: Sequence[RunResults]) -> Table:
    """The one figure to compare runs by."""

    def rows(run: RunResults) -> dict[str, list[Cell]]:
        return {name: [cell(reading.recovered_share)] for name, reading in run.evaluation.anchors.items()}

    return _table("Run against run", ["recovered share"], runs, rows)


def transfer(runs: Sequence[RunResults]) -> Table:
    """Readers of another family and width, through every projector."""

    def rows(run: RunResults) -> dict[str, list[Cell]]:
        return _readable(
            {
                f"{name} · {projector}": [*_headline_cells(reading), cell(reading.outside_span)]
                for name, readings in run.evaluation.transfer.items()
                for projector, reading in readings.items()
            }
        )

    return _table("Readers of another family", [*_HEADLINE_COLUMNS, "outside span"], runs, rows)


def by_kind(runs: Sequence[RunResults]) -> Table:
    """Every figure of the headline by kind of question."""

    def rows(run: RunResults) -> dict[str, list[Cell]]:
        return {
            f"{kind} · {name}": _headline_cells(reading)
            for name, anchor in run.evaluation.anchors.items()
            for kind, reading in anchor.kinds.items()
        }

    return _table("Exact match by kind of question", _HEADLINE_COLUMNS, runs, rows, folded=True)


def nll(runs: Sequence[RunResults]) -> Table:
    """NLL of the whole answer and of its first token."""
    columns = [*CONDITIONS, *(f"{condition}, first token" for condition in CONDITIONS)]

    def rows(run: RunResults) -> dict[str, list[Cell]]:
        return {
            name: [
                _entry(figures, condition)
                for figures in (reading.nll, reading.first_token_nll)
                for condition in CONDITIONS
            ]
            for name, reading in run.evaluation.anchors.items()
        }

    return _table("NLL in nats per token", columns, runs, rows, folded=True)


def verdicts(runs: Sequence[RunResults]) -> Table:
    """Whether each anchor uses the latents, and why that is concluded."""

    def rows(run: RunResults) -> dict[str, list[Cell]]:
        return {
            name: [Cell(causal.verdict), *(_entry(causal.lost_share, test) for test in VERDICT_TESTS)]
            for name, causal in run.evaluation.causal.items()
        }

    columns = ["verdict", *(f"lost to {test.replace('_', ' ')}" for test in VERDICT_TESTS)]
    return _table("Used? Share of the gain lost to each swap", columns, runs, rows)


def causal(runs: Sequence[RunResults]) -> Table:
    """Every causal test of every anchor."""
    return _swaps("All causal tests", runs, lambda run: {n: c.tests for n, c in run.evaluation.causal.items()})


def controls(runs: Sequence[RunResults]) -> Table:
    """Image controls and perturbations of every anchor."""
    return _swaps("Image controls and perturbations", runs, lambda run: run.evaluation.controls)


def usage(runs: Sequence[RunResults]) -> Table:
    """Every condition of the usage test; what attention goes to the latents."""

    def rows(run: RunResults) -> dict[str, list[Cell]]:
        if run.evaluation.usage is None:
            return {}
        conditions = run.evaluation.usage.conditions
        return {
            name.replace("_", " "): [_entry(figures, column) for column in _USAGE_COLUMNS]
            for name, figures in conditions.items()
        }

    return _table("Usage test", list(_USAGE_COLUMNS.values()), runs, rows)


def usage_by_kind(runs: Sequence[RunResults]) -> Table:
    """Accuracy under every condition, by kind of question."""

    def rows(run: RunResults) -> dict[str, list[Cell]]:
        if run.evaluation.usage is None:
            return {}
        return {
            f"{kind} · {name.replace('_', ' ')}": [_entry(figures, "accuracy")]
            for kind, conditions in run.evaluation.usage.kinds.items()
            for name, figures in conditions.items()
        }

    return _table("Usage test by kind of question", ["accuracy"], runs, rows, folded=True)


def geometry(runs: Sequence[RunResults]) -> Table:
    """Figures of geometry, the linear probes among them."""

    def rows(run: RunResults) -> dict[str, list[Cell]]:
        cells = {f"linear CKA with {name}": [cell(other.cka)] for name, other in run.evaluation.against.items()}
        geometry = run.evaluation.geometry
        if geometry is None:
            return cells
        cells |= {name: [cell(figure)] for name, figure in geometry.figures.items()}
        for name, slots in geometry.slots.items():
            cells[f"{name}: utility in nats"] = [cell(slots.utility)]
            cells[f"{name}: helpful slots"] = [Cell(f"{slots.helpful_slots} of {len(slots.utility_alone)}")]
        if geometry.probes is not None:
            cells["linear probe: latents"] = [cell(geometry.probes.latents)]
            cells["linear probe: answer position"] = [cell(geometry.probes.answer_state)]
            cells["linear probe: gap"] = [cell(geometry.probes.gap)]
        return _readable(cells)

    return _table("Geometry and linear probes", ["value"], runs, rows)


def benchmarks(runs: Sequence[RunResults]) -> Table:
    """The figure that stands for each public benchmark, per anchor."""

    def rows(run: RunResults) -> dict[str, list[Cell]]:
        cells = {}
        for name, benchmark in run.evaluation.benchmarks.items():
            for anchor, by_condition in benchmark.anchors.items():
                latents = by_condition["latents"]
                counts = (latents.n, benchmark.left_out, len(latents.unparsed))
                cells[f"{name}, {latents.headline} · {anchor}"] = [
                    *_scores(by_condition, latents.headline),
                    *(Cell(str(count)) for count in counts),
                ]
        return _readable(cells)

    columns = [*_BENCHMARK_COLUMNS, "records", "left out", "unparsed"]
    return _table("Benchmarks, the official figure of each", columns, runs, rows)


def benchmark_details(runs: Sequence[RunResults]) -> Table:
    """Every official figure of every public benchmark, per anchor."""

    def rows(run: RunResults) -> dict[str, list[Cell]]:
        return _readable(
            {
                f"{name}, {figure} · {anchor}": _scores(by_condition, figure)
                for name, benchmark in run.evaluation.benchmarks.items()
                for anchor, by_condition in benchmark.anchors.items()
                for figure in _flat(by_condition["latents"].scores)
            }
        )

    return _table("Benchmarks, all official figures", _BENCHMARK_COLUMNS, runs, rows, folded=True)


def _table(
    title: str,
    columns: Sequence[str],
    runs: Sequence[RunResults],
    rows_of: Callable[[RunResults], Mapping[str, list[Cell]]],
    *,
    folded: bool = False,
) -> Table:
    """Rows of any run, in order of first appearance; a run without the row gets dashes."""
    by_run = [rows_of(run) for run in runs]
    names = dict.fromkeys(name for rows in by_run for name in rows)
    blank = [_ABSENT] * len(columns)
    joined = {name: [entry for rows in by_run for entry in rows.get(name, blank)] for name in names}
    return Table(title, [run.label for run in runs], columns, joined, folded)


def _swaps(
    title: str,
    runs: Sequence[RunResults],
    tests_of: Callable[[RunResults], Mapping[str, Mapping[str, Figures]]],
) -> Table:
    def rows(run: RunResults) -> dict[str, list[Cell]]:
        return _readable(
            {
                f"{test} · {name}": [_entry(figures, column) for column in _SWAP_COLUMNS]
                for name, tests in tests_of(run).items()
                for test, figures in tests.items()
            }
        )

    return _table(title, list(_SWAP_COLUMNS.values()), runs, rows, folded=True)


def _headline_cells(reading: Reading) -> list[Cell]:
    figures = [*(getattr(reading, condition) for condition in CONDITIONS), reading.recovered_share]
    return [*(cell(figure) for figure in figures), Cell("–" if reading.latents.n is None else str(reading.latents.n))]


def _number(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def _scores(by_condition: Mapping[Condition, Scores], figure: str) -> list[Cell]:
    chance = by_condition["latents"].chance
    trees = [*(by_condition[name].scores for name in _READ_FROM), chance.scores if chance else {}]
    values = [_flat(tree).get(figure) for tree in trees]
    return [_ABSENT if value is None else cell(value) for value in values]


def _flat(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """Figures by name, those of a part of the benchmark as "category: part"."""
    flat: dict[str, float | None] = {}
    for name, value in scores.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}: {part}": figure for part, figure in _flat(value).items()}
        else:
            flat[name] = None if value is None else float(value)
    return flat


def _entry(figures: Figures, name: str) -> Cell:
    return cell(figures[name]) if name in figures else _ABSENT


def _readable(rows: dict[str, list[Cell]]) -> dict[str, list[Cell]]:
    return {name.replace("_", " "): cells for name, cells in rows.items()}
